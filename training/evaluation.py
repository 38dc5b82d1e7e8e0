"""Every figure the model card quotes, each by one command: `python -m training.evaluation ...`.

All predict by the reference sampler, or, with `--engine`, by rollouts of a bundle on that engine;
they write JSON and print the same, and a number that is not finite becomes null. `protocol` takes
the papers' real data, `recordings` anyone's, `plot` draws what `ablations` wrote, and the others
run on held-out ToyTable clips (`training.measures`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import math
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

from canvasmar_rt import __version__, load
from canvasmar_rt.command import print_error, run_command
from canvasmar_rt.config import SamplingConfig, to_dict
from canvasmar_rt.contact_sheet import contact_sheet
from canvasmar_rt.errors import ConfigError, EngineError, InputError
from canvasmar_rt.files import check_writable, is_stream, write_file
from canvasmar_rt.rollout import Predictor
from canvasmar_rt.schedule import set_sizes

try:
    import torch
    from torch import Tensor

    from canvasmar_rt.models.canvasmar import FrameModel
    from canvasmar_rt.models.families import build, count_parameters
    from training.clips import check_actions
    from training.datasets import READERS, DataSet, RecordedClips
    from training.figures import draw_ablations, draw_comparison
    from training.measures import (
        ABLATIONS,
        check_predicted,
        given_frames,
        held_out,
        measure_ablations,
        measure_curves,
        measure_losses,
        measure_one_step,
        measure_recall,
        measure_reconstruction,
        measure_recordings,
        measure_rollouts,
    )
    from training.metrics import I3D, PROTOCOLS, Lpips
    from training.options import SetData, override
    from training.protocols import context_frames, measure_protocol
    from training.stages import (
        continue_clips,
        weights_id,
    )
    from training.toytable_metrics import METRIC_SIZE
    from training.trainer import load_weights, progress_bar
    from training.transfer import transfer
except ImportError as missing:
    print_error(
        EngineError(f'evaluation needs PyTorch and more ({missing}): pip install -e ".[train]"')
    )
    sys.exit(2)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Figures of a trained model as JSON: on held-out ToyTable clips, on recordings of your "
    "own, or by the papers' protocols on their data.",
)

Checkpoint = Annotated[
    Path, typer.Argument(help="A run directory, a checkpoint, or a bundle by its path or name.")
]
Output = Annotated[Path, typer.Option("--output", "-o", help="JSON file to write.")]
Picture = Annotated[Path, typer.Option("--output", "-o", help="PNG to write.")]
Clip = Annotated[int, typer.Option("--clips", min=2, help="Held-out clips of a point.")]
Batch = Annotated[int, typer.Option(min=1, help="Clips predicted together.")]
Context = Annotated[int, typer.Option(min=1, help="Latent frames of context.")]
Frames = Annotated[int, typer.Option(min=1, help="Pixel frames to predict, a multiple of t.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the sampling noise.")]
Device = Annotated[str, typer.Option(help="cpu, cuda.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.")]
Engine = Annotated[
    str,
    typer.Option(
        help="Predict by rollouts of the bundle on this engine (onnxruntime, torch) "
        "instead of the reference sampler."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]
Sampling = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a sampling option, name=value; repeat as needed."),
]

SetModel = Annotated[
    list[str] | None,
    typer.Option(
        "--set-model",
        help="Run the weights in a model of another window or grid, e.g. context_frames=32, or "
        "autoencoder.height=96 with autoencoder.width=96.",
    ),
]


# -- commands


@app.command()
def reconstruction(
    checkpoint: Checkpoint,
    output: Output,
    clips: Clip = 256,
    frames: Annotated[int, typer.Option(min=1)] = 17,
    batch: Batch = 16,
    engine: Engine = "",
    device: Device = "cpu",
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """PSNR of held-out clips through the autoencoder; with --engine, decoded there."""
    model, _ = _load_toytable(checkpoint, output, device, threads, None, whole=False)
    predictor = _predictor(checkpoint, engine, device, threads)
    with progress_bar("reconstruction", clips, quiet) as tick:
        result = measure_reconstruction(
            model, clips=clips, frames=frames, batch=batch, tick=tick, predictor=predictor
        )
    _write(output, "reconstruction", model, None, result, quiet, engine)


@app.command()
def losses(
    checkpoint: Checkpoint,
    output: Output,
    clips: Clip = 256,
    batch: Batch = 16,
    device: Device = "cpu",
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """The training losses on held-out clips, under the same noise for every model."""
    model, _ = _load_toytable(checkpoint, output, device, threads, None)
    with progress_bar("losses", clips, quiet) as tick:
        result = measure_losses(model, clips=clips, batch=batch, tick=tick)
    _write(output, "losses", model, None, result, quiet)


@app.command()
def one_step(
    checkpoint: Checkpoint,
    output: Output,
    clips: Clip = 512,
    context: Context = 3,
    batch: Batch = 32,
    seed: Seed = 0,
    set_: Sampling = None,
    engine: Engine = "",
    device: Device = "cpu",
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """One latent frame ahead: prediction, canvas alone, a copy of the last frame."""
    model, sampling = _load_toytable(checkpoint, output, device, threads, set_)
    predictor = _predictor(checkpoint, engine, device, threads)
    with progress_bar("one step", clips, quiet) as tick:
        result = measure_one_step(
            model, sampling, clips=clips, context=context, batch=batch, seed=seed, tick=tick,
            predictor=predictor,
        )  # fmt: skip
    _write(output, "one-step", model, sampling, result, quiet, engine)


@app.command()
def rollouts(
    checkpoint: Checkpoint,
    output: Output,
    clips: Clip = 256,
    frames: Frames = 16,
    context: Context = 2,
    batch: Batch = 32,
    seed: Seed = 0,
    set_: Sampling = None,
    set_model: SetModel = None,
    engine: Engine = "",
    device: Device = "cpu",
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Rollouts with and without their actions: gripper error, toys kept, Frechet distance. A model
    that takes no actions is measured without."""
    model, sampling = _load_toytable(checkpoint, output, device, threads, set_, set_model)
    predictor = _predictor(checkpoint, engine, device, threads, set_model)
    modes = {"with_actions": True} if model.config.action_dim else {}
    modes["without_actions"] = False
    result = {}
    with progress_bar("rollouts", len(modes) * clips, quiet) as tick:
        for name, given in modes.items():
            result[name] = measure_rollouts(
                model, sampling, clips=clips, frames=frames, context=context, batch=batch,
                seed=seed, tick=tick, use_actions=given, predictor=predictor,
            )  # fmt: skip
    _write(output, "rollouts", model, sampling, result, quiet, engine)


@app.command()
def long(
    checkpoint: Checkpoint,
    output: Output,
    clips: Clip = 128,
    frames: Frames = 100,
    context: Context = 2,
    batch: Batch = 32,
    seed: Seed = 0,
    set_: Sampling = None,
    set_model: SetModel = None,
    engine: Engine = "",
    device: Device = "cpu",
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Long rollouts: the last sixteen frames against frames 5 to 20, toys kept, colour, detail."""
    model, sampling = _load_toytable(checkpoint, output, device, threads, set_, set_model)
    predictor = _predictor(checkpoint, engine, device, threads, set_model)
    if frames < 36:
        raise InputError(f"long rollouts need at least 36 frames, got {frames}")
    with progress_bar("long rollouts", clips, quiet) as tick:
        result = measure_rollouts(
            model, sampling, clips=clips, frames=frames, context=context, batch=batch,
            seed=seed, tick=tick, windows=((5, 20), (frames - 15, frames)), predictor=predictor,
        )  # fmt: skip
    _write(output, "long", model, sampling, result, quiet, engine)


@app.command()
def recall(
    checkpoint: Checkpoint,
    output: Output,
    clips: Clip = 512,
    frames: Annotated[int, typer.Option(min=1, help="Pixel frames of a clip.")] = 33,
    seed: Seed = 0,
    set_: Sampling = None,
    engine: Engine = "",
    device: Device = "cpu",
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Toys that come back from under the arm, one latent frame ahead of the true ones."""
    model, sampling = _load_toytable(checkpoint, output, device, threads, set_)
    predictor = _predictor(checkpoint, engine, device, threads)
    with progress_bar("recall", clips, quiet) as tick:
        result = measure_recall(
            model, sampling, clips=clips, frames=frames, seed=seed, tick=tick, predictor=predictor
        )
    _write(output, "recall", model, sampling, result, quiet, engine)


@app.command()
def ablations(
    checkpoint: Checkpoint,
    output: Output,
    no_canvas: Annotated[Path, typer.Option(help="The no-canvas model, given in the same ways.")],
    clips: Clip = 512,
    frames: Frames = 16,
    context: Context = 2,
    steps: Annotated[str, typer.Option(help="AR steps, with commas.")] = "1,2,4,8",
    seeds: Annotated[int, typer.Option(min=1, help="Sets of clips.")] = 3,
    batch: Batch = 32,
    set_: Sampling = None,
    device: Device = "cpu",
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """The paper's Figure 3: canvas, motion-aware order and guidance against AR steps. The file is
    written after every point; started again with the same options, only the rest is measured."""
    model, sampling = _load_toytable(checkpoint, output, device, threads, set_)
    plain, _ = _load_toytable(no_canvas, output, device, threads, None)
    counts = _step_counts(steps)
    measure = functools.partial(
        measure_ablations, model, plain, sampling, steps=counts, seeds=seeds, clips=clips,
        frames=frames, context=context, batch=batch,
    )  # fmt: skip
    points = clips * seeds * len(counts) * len(ABLATIONS)
    _write_curves(output, "ablations", model, sampling, points, measure, quiet)


@app.command()
def compare(
    models: Annotated[
        list[str], typer.Argument(metavar="NAME=CHECKPOINT...", help="Models, as for ablations.")
    ],
    output: Output,
    clips: Clip = 512,
    frames: Frames = 16,
    context: Context = 2,
    steps: Annotated[str, typer.Option(help="AR steps, with commas.")] = "2,4,8",
    seeds: Annotated[int, typer.Option(min=1, help="Sets of clips.")] = 3,
    batch: Batch = 32,
    set_: Sampling = None,
    device: Device = "cpu",
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Frechet distance of several models, of whatever family, against AR steps. Resumes as
    `ablations` does."""
    loaded = {}
    for text in models:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise ConfigError(f"{text!r}: expected NAME=CHECKPOINT")
        if name in loaded:
            raise ConfigError(f"{text!r}: there is a {name} before; give every model its name")
        loaded[name] = _load_toytable(Path(path), output, device, threads, set_)
    counts = _step_counts(steps)
    (first, sampling), *_ = loaded.values()
    about = {
        "models": {
            name: {
                "weights": weights_id(model),
                "sampling": to_dict(own),
                "family": model.config.family,
                "group": model.config.group,
                "parameters": sum(
                    n for part, n in count_parameters(model.config).items() if part != "autoencoder"
                ),
            }
            for name, (model, own) in loaded.items()
        }
    }
    measure = functools.partial(
        measure_curves, loaded, steps=counts, seeds=seeds, clips=clips, frames=frames,
        context=context, batch=batch, about=about,
    )  # fmt: skip
    points = clips * seeds * len(counts) * len(loaded)
    _write_curves(output, "compare", first, sampling, points, measure, quiet)


def _write_curves(
    output: Path,
    what: str,
    model: FrameModel,
    sampling: SamplingConfig,
    points: int,
    measure: Callable[..., dict[str, Any]],
    quiet: bool,
) -> None:
    """Write what `measure` finds, after every point, and go on from what the file holds; `points`
    are the clips of them all."""

    def report(result: dict[str, Any]) -> dict[str, Any]:
        return _report(what, model, sampling, result)

    with progress_bar(what, points, quiet) as tick:
        result = measure(
            tick=tick,
            before=lambda result: _curves_before(output, report(result)),
            keep=lambda result: _write_report(output, report(result)),
        )
    _write(output, what, model, sampling, result, quiet)


def _step_counts(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(k) for k in text.split(",")}))
    except ValueError:
        raise ConfigError(f"--steps {text!r}: expected whole numbers with commas") from None


@app.command()
def plot(
    measured: Annotated[
        Path, typer.Argument(help="JSON file that `ablations` or `compare` wrote.")
    ],
    output: Picture,
) -> None:
    """Draw the paper's Figure 3 from what `ablations` measured, or the curves of `compare`."""
    _check_png(output)
    check_writable(output)
    report = _read_ablations(measured)
    draw = draw_comparison if report["what"] == "compare" else draw_ablations
    write_file(output, draw(report["result"]))


@app.command()
def sheet(
    checkpoint: Checkpoint,
    output: Picture,
    clips: Annotated[int, typer.Option(min=1)] = 4,
    first: Annotated[int, typer.Option(min=0, help="First held-out clip.")] = 0,
    frames: Frames = 16,
    every: Annotated[int, typer.Option(min=1, help="Show every n-th frame.")] = 2,
    context: Context = 2,
    seed: Seed = 0,
    set_: Sampling = None,
    set_model: SetModel = None,
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Held-out clips above their continuations."""
    _check_png(output)
    model, sampling = _load_toytable(checkpoint, output, device, threads, set_, set_model)
    check_predicted(model, frames)
    given = given_frames(model, context)
    drawn = held_out(first, clips, given + frames, model.config.autoencoder.height)
    shown = continue_clips(
        model, sampling, drawn, context=context, seed=seed, first_stream=first
    ).frames
    write_file(output, _pairs(drawn.frames, shown, given, every, first))


def _check_png(output: Path) -> None:
    if output.suffix.lower() != ".png" and not is_stream(output):
        raise InputError(f"{output}: expected a name ending in .png, got {output.suffix!r}")


def _pairs(real: Tensor, shown: Tensor, given: int, every: int, first: int = 0) -> bytes:
    """A PNG of clips (B, T, H, W, 3) above their continuations, from the last frame given on."""
    picks = range(given - 1, real.shape[1], every)
    rows = [
        (f"{label} {first + i}", [np.asarray(side[i, j]) for j in picks])
        for i in range(len(real))
        for label, side in (("true", real), ("predicted", shown))
    ]
    columns = ["given", *(str(j - given + 1) for j in picks[1:])]
    data = io.BytesIO()
    Image.fromarray(contact_sheet(rows, columns=columns, scale=1)).save(data, "PNG")
    return data.getvalue()


@app.command()
def recordings(
    checkpoint: Checkpoint,
    output: Output,
    root: Annotated[Path, typer.Option(help="Where the data set lies.")],
    data: Annotated[str, typer.Option(help=f"Reader: {', '.join(READERS)}.")] = "videos",
    set_data: SetData = None,
    split: Annotated[str, typer.Option(help="Part of the data set.")] = "test",
    clips: Annotated[int, typer.Option(min=1, help="Clips to predict.")] = 64,
    frames: Frames = 16,
    context: Context = 2,
    batch: Batch = 16,
    seed: Seed = 0,
    set_: Sampling = None,
    engine: Engine = "",
    device: Device = "cpu",
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """PSNR and SSIM of any recordings continued under their actions, beside a copy of the last
    frame and the autoencoder's bound; and beside the JSON file a sheet of the first four."""
    picture = output.with_suffix(".png")
    if picture == output:
        raise InputError(f"{output}: is for the JSON; the sheet is drawn beside it")
    if is_stream(output):
        raise InputError(f"{output}: the sheet is drawn beside the JSON; give the name of a file")
    check_writable(picture)
    model, sampling = _load(checkpoint, output, device, threads, set_)
    predictor = _predictor(checkpoint, engine, device, threads)
    check_predicted(model, frames)
    given, ae = given_frames(model, context), model.config.autoencoder
    chosen = DataSet.of(data, root, set_data)
    source = chosen.source(
        frames=given + frames, height=ae.height, width=ae.width, seed=seed, split=split
    )
    check_actions(model.config, source.action_dim)
    with progress_bar("recordings", clips, quiet) as tick:
        result, real, shown = measure_recordings(
            model, sampling, source, clips=clips, context=context, batch=batch, seed=seed,
            tick=tick, predictor=predictor,
        )  # fmt: skip
    result["data"] = chosen.described() | {
        "split": split, "seed": seed, "recordings": len(source),
        "skipped_recordings": len(source.skipped),
    }  # fmt: skip
    write_file(picture, _pairs(real, shown, given, max(1, frames // 8)))
    _write(output, "recordings", model, sampling, result, quiet, engine)
    if model.config.action_dim and not source.action_dim and not quiet:
        typer.echo("measured without actions: --set-data action_dim=A gives A a frame", err=True)
    _tell_skipped(source, quiet)


@app.command()
def protocol(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(PROTOCOLS)}.")],
    checkpoint: Checkpoint,
    output: Output,
    root: Annotated[Path, typer.Option(help="Where the data set lies.")],
    i3d: Annotated[Path, typer.Option(help="TorchScript file of the I3D network.")],
    lpips: Annotated[
        Path | None, typer.Option(help="TorchScript file of an LPIPS network.")
    ] = None,
    data: Annotated[
        str, typer.Option(help=f"Reader, if not the usual one: {', '.join(READERS)}.")
    ] = "",
    set_data: SetData = None,
    split: Annotated[str, typer.Option(help="Part of the data set.")] = "test",
    clips: Annotated[
        int | None, typer.Option(min=2, help="Real clips, if fewer than the protocol has.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Predictions of each, if not the protocol's number.")
    ] = None,
    batch: Batch = 16,
    seed: Seed = 0,
    set_: Sampling = None,
    device: Device = "cpu",
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """FVD by the papers' protocols on their data, with PSNR, SSIM and LPIPS."""
    if name not in PROTOCOLS:
        raise ConfigError(f"no protocol {name!r}; there are {', '.join(PROTOCOLS)}")
    chosen = PROTOCOLS[name]
    model, sampling = _load(checkpoint, output, device, threads, set_)
    context_frames(model, chosen.conditioning)
    place = model.device
    features = I3D(i3d, device=place, chunk=batch)
    distance = None if lpips is None else Lpips(lpips, device=place)
    usual = name.split("-")[0]
    readers = {"bair": ("bair-tfrecord", "bair-frames")}.get(usual, (usual,))
    given = DataSet.of(data or readers[0], root, set_data)
    source = given.source(
        frames=chosen.conditioning + chosen.predicted,
        height=model.config.autoencoder.height,
        width=model.config.autoencoder.width,
        seed=seed,
        split=split,
    )
    places = clips or (chosen.videos or len(source)) * chosen.places
    with progress_bar(name, places * (samples or chosen.samples), quiet) as tick:
        result = measure_protocol(
            model, sampling, chosen, source, features, lpips=distance, clips=clips,
            samples=samples, batch=batch, seed=seed, tick=tick,
            usual=given.name in readers and split == "test" and given.usual,
        )  # fmt: skip
    result |= {"data": given.described(), "split": split}
    result["i3d_sha256"] = hashlib.sha256(i3d.read_bytes()).hexdigest()
    _write(output, "protocol", model, sampling, result, quiet)
    _tell_skipped(source, quiet)


def _tell_skipped(source: RecordedClips, quiet: bool) -> None:
    if source.skipped and not quiet:
        left, (first, reason) = len(source.skipped), next(iter(source.skipped.items()))
        typer.echo(f"recordings left out: {left}, the first {first}: {reason}", err=True)


# -- files


def _load(
    checkpoint: Path,
    output: Path,
    device: str,
    threads: int | None,
    assignments: list[str] | None,
    *,
    whole: bool = True,
    regridded: bool = False,
) -> tuple[FrameModel, SamplingConfig]:
    """Model and sampling options; what hours of work would end in is checked first."""
    check_writable(output)
    if threads is not None:
        torch.set_num_threads(threads)
    model, sampling = load_weights(checkpoint, whole=whole)
    sampling = override(sampling, assignments)
    if not regridded:  # its caller counts the tokens of the new grid
        set_sizes(model.config.tokens, sampling.ar_steps)
    try:
        return model.to(torch.device(device)), sampling
    except (RuntimeError, AssertionError) as error:  # the latter of a torch without CUDA
        reason = str(error).split("\n")[0]
        raise InputError(f"device {device!r} cannot be had ({reason})") from None


def _load_toytable(
    checkpoint: Path,
    output: Path,
    device: str,
    threads: int | None,
    assignments: list[str] | None,
    model_assignments: list[str] | None = None,
    *,
    whole: bool = True,
) -> tuple[FrameModel, SamplingConfig]:
    model, sampling = _load(
        checkpoint, output, device, threads, assignments, whole=whole,
        regridded=bool(model_assignments),
    )  # fmt: skip
    ae, actions = model.config.autoencoder, model.config.action_dim // model.config.group
    if {ae.height, ae.width} != {METRIC_SIZE} or actions not in (0, 2 * ae.temporal_compression):
        raise ConfigError(
            f"{checkpoint}: ToyTable has 64x64 pixels and {2 * ae.temporal_compression} numbers of "
            f"action a latent step; the model takes {ae.height}x{ae.width} and {actions}"
        )
    if model_assignments:
        config = override(model.config, model_assignments)
        height, width = config.autoencoder.height, config.autoencoder.width
        same = dataclasses.replace(
            model.config, context_frames=config.context_frames,
            autoencoder=dataclasses.replace(model.config.autoencoder, height=height, width=width),
        )  # fmt: skip
        if config != same:
            raise ConfigError(
                "--set-model: only context_frames, autoencoder.height and autoencoder.width may be "
                "others than the weights were trained with"
            )
        if config.autoencoder.height != config.autoencoder.width:
            raise ConfigError(
                "--set-model: ToyTable is square; give autoencoder.height and autoencoder.width"
            )
        network = build(config)
        transfer(model, network, str(checkpoint), autoencoder=True)
        set_sizes(config.tokens, sampling.ar_steps)
        model = network.to(model.device)
    return model, sampling


def _predictor(
    checkpoint: Path,
    engine: str,
    device: str,
    threads: int | None,
    model_assignments: list[str] | None = None,
) -> Predictor | None:
    if not engine:
        return None
    if model_assignments:
        raise ConfigError("--set-model: an engine runs what was exported; leave --engine out")
    return load(checkpoint, engine=engine, device=device, threads=threads)


def _report(
    what: str,
    model: FrameModel,
    sampling: SamplingConfig | None,
    result: dict[str, Any],
    engine: str = "",
) -> dict[str, Any]:
    device = model.device
    return {
        "what": what,
        "model": to_dict(model.config),
        "sampling": None if sampling is None else to_dict(sampling),
        "weights": weights_id(model),
        "engine": engine or None,
        "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "version": __version__,
        "result": _rounded(result),
    }


def _write_report(path: Path, report: dict[str, Any]) -> None:
    write_file(path, json.dumps(report, indent=2, allow_nan=False) + "\n")


def _write(
    path: Path,
    what: str,
    model: FrameModel,
    sampling: SamplingConfig | None,
    result: dict[str, Any],
    quiet: bool,
    engine: str = "",
) -> None:
    report = _report(what, model, sampling, result, engine)
    _write_report(path, report)
    if not quiet:
        print(json.dumps(report["result"], indent=2))


def _read_ablations(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from None
    if (
        not isinstance(report, dict)
        or report.get("what") not in ("ablations", "compare")
        or not isinstance(report.get("result"), dict)
    ):
        raise InputError(
            f"{path}: not written by `python -m training.evaluation ablations` or `compare`"
        )
    return report


def _curves_before(path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The curves of a report that an interrupted command left; none without one.

    Raises:
        InputError: if the file is something else.
        ConfigError: if they were measured with other settings.
    """
    if not path.exists():
        return {}
    found, wanted = _read_ablations(path), json.loads(json.dumps(wanted))
    curves = found["result"].pop("curves", {})
    have, want = ({**r, **r["result"], "result": None} for r in (found, wanted))
    differing = [name for name, value in want.items() if have.get(name) != value]
    if differing:
        raise ConfigError(
            f"{path}: holds points measured with another {' and '.join(differing)}; choose another "
            "file, or give the same options to go on"
        )
    return dict(curves)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


if __name__ == "__main__":
    run_command(app)
