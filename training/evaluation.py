"""Every figure the model card quotes, each by one command: `python -m training.evaluation ...`.

All predict by the reference sampler, or, with `--engine`, by rollouts of a bundle on that engine;
they write JSON and print the same, and a number that is not finite becomes null. `protocol` takes
the papers' real data, `plot` draws what `ablations` wrote, and the others run on held-out ToyTable
clips (seed 1; training draws from seed 0). Held-out clip i draws its noise from stream i, so its
prediction does not depend on the batch it falls into (but for the rounding of int8 bundles).

Shapes: B clips, T pixel frames, t pixel frames per latent frame; a context of n latent frames is
1 + (n-1)*t pixel frames.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import math
import platform
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor, nn

from canvasmar_rt import __version__, load
from canvasmar_rt.command import run_command
from canvasmar_rt.config import AutoencoderConfig, SamplingConfig, to_dict
from canvasmar_rt.contact_sheet import contact_sheet
from canvasmar_rt.errors import ConfigError, InputError
from canvasmar_rt.files import check_writable, write_file
from canvasmar_rt.models import sampler
from canvasmar_rt.models.autoencoder import first_frame_group
from canvasmar_rt.models.canvasmar import FrameModel
from canvasmar_rt.models.families import build, count_parameters
from canvasmar_rt.rollout import Predictor
from canvasmar_rt.schedule import set_sizes
from training.clips import Clips, ToyTableSource, check_length, latent_actions
from training.config import ModelTraining
from training.datasets import READERS, make_source
from training.figures import draw_ablations, draw_comparison
from training.losses import Draws, model_loss
from training.metrics import I3D, PROTOCOLS, GaussianStats, Lpips, psnr
from training.options import override
from training.protocols import context_frames, measure_protocol
from training.stages import (
    HELD_OUT_SEED,
    continue_clips,
    decode_clips,
    encode_clips,
    reconstruct,
    weights_id,
)
from training.toytable_metrics import METRIC_SIZE, ToyTableEvaluator, pair_features
from training.trainer import load_weights, progress_bar
from training.transfer import transfer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Figures of a trained model as JSON: on held-out ToyTable clips, or by the papers' "
    "protocols on their data.",
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
Threads = Annotated[int | None, typer.Option(help="CPU threads.")]
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


def held_out(first: int, count: int, frames: int, size: int) -> Clips:
    """Held-out clips first ... first + count - 1."""
    return ToyTableSource(frames=frames, size=size, seed=HELD_OUT_SEED).clips(first, count)


def batches(
    model: FrameModel, clips: int, batch: int, frames: int, *, start: int = 0
) -> Iterator[tuple[int, Clips]]:
    """(index of the first, clips) of held-out clips start ... start + clips - 1 in turn."""
    size = model.config.autoencoder.height
    for first in range(start, start + clips, batch):
        yield first, held_out(first, min(batch, start + clips - first), frames, size)


def as_measured(frames: Tensor) -> Tensor:
    """uint8 clips (B, T, H, H, 3) at the 64x64 pixels that ToyTable's readings want."""
    if frames.shape[2] == METRIC_SIZE:
        return frames
    pictures = frames.flatten(0, 1).permute(0, 3, 1, 2).float()
    resized = nn.functional.interpolate(
        pictures, (METRIC_SIZE, METRIC_SIZE), mode="bilinear", antialias=True
    )
    resized = resized.round().clamp(0, 255).to(torch.uint8)
    return resized.permute(0, 2, 3, 1).reshape(*frames.shape[:2], *resized.shape[2:], 3)


def held(frames: Tensor, given: int, count: int) -> Tensor:
    """The last of the frames given of clips (B, T, ...), again and again: (B, count, ...)."""
    last = frames[:, given - 1 : given]
    return last.expand(-1, count, *last.shape[2:])


def _given(model: FrameModel, context: int) -> int:
    """Pixel frames of a context of latent frames."""
    return 1 + (context - 1) * model.config.autoencoder.temporal_compression


def _check_predicted(model: FrameModel, frames: int) -> None:
    t = model.config.autoencoder.temporal_compression
    if frames < 1 or frames % t:
        raise InputError(f"{frames} predicted frames are not whole latent frames of {t}")


def measure_reconstruction(
    model: FrameModel, *, clips: int, frames: int, batch: int, tick: Callable[[int], None]
) -> dict[str, Any]:
    """PSNR of clips through the autoencoder: the mean over all frames, over each frame of a clip
    (one that drifts shows), and that of the mean squared error of all pixels, which the worst
    frames weigh on. And the root mean square of how far normalised latents move from one frame to
    the next where no pixel of their patch changes by more than a grey level, and elsewhere: what
    stays is the easier to predict the less its latents move.

    Raises:
        InputError: if the clips are not 1 + n*t frames long.
    """
    check_length(frames, model.config.autoencoder.temporal_compression)
    values, moves, stays = [], [], []
    for _, given in batches(model, clips, batch, frames):
        latents = sampler.encode(model, given.frames.to(model.device))
        values.append(psnr(given.frames, decode_clips(model, latents)))
        moves.append(latents.diff(dim=1).square().mean(-1).cpu())
        stays.append(still_patches(model.config.autoencoder, given.frames))
        tick(len(given.frames))
    found, moved, still = torch.cat(values), torch.cat(moves), torch.cat(stays)
    error = 10 ** (-found / 10)  # of each frame, as a share of 255 squared
    return {
        "psnr_db": float(found.mean()),
        "psnr_db_of_mean_error": float(-10 * torch.log10(error.mean())),
        "psnr_db_by_frame": [round(v, 2) for v in found.mean(0).tolist()],
        "latents": {
            "still_share": float(still.float().mean()),
            "still_move": float(moved[still].mean().sqrt()),
            "other_move": float(moved[~still].mean().sqrt()),
        },
        "clips": clips,
        "frames": frames,
    }


def still_patches(config: AutoencoderConfig, frames: Tensor) -> Tensor:
    """Where the pixels of two latent frames after each other are alike to a grey level, of uint8
    clips (B, 1+n*t, H, W, 3): bool (B, n, N)."""
    t, side = config.temporal_compression, config.spatial_compression
    groups = first_frame_group(frames, t).short()
    groups = groups.reshape(len(frames), -1, t, *frames.shape[2:])
    change = groups.diff(dim=1).abs().amax((2, -1))  # (B, n, H, W)
    grid = (config.latent_height, side, config.latent_width, side)
    patches = change.reshape(*change.shape[:2], *grid).amax((3, 5))
    return (patches <= 1).flatten(2)


class AlikeDraws(Draws):
    """Draws that do not depend on what else a model draws: each is keyed by its distribution, its
    shape and how many like it came before. So a model with a canvas and one without see the same
    masks, times and flow noise."""

    def __init__(self, device: torch.device, *, seed: int, step: int, clips: Sequence[int]) -> None:
        super().__init__(device, seed=seed, step=step, clips=clips)
        self._seed, self._step, self._rows = seed, step, clips
        self._drawn: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def _next(self, kind: str, shape: tuple[int, ...]) -> Draws:
        key = repr((self._seed, kind, shape, self._drawn[kind, shape]))
        self._drawn[kind, shape] += 1
        seed = zlib.crc32(key.encode())
        return Draws(self.device, seed=seed, step=self._step, clips=self._rows)

    def normal(self, *shape: int) -> Tensor:
        return self._next("normal", shape).normal(*shape)

    def uniform(self, *shape: int) -> Tensor:
        return self._next("uniform", shape).uniform(*shape)


@torch.no_grad()
def measure_losses(
    model: FrameModel, *, clips: int, batch: int, tick: Callable[[int], None]
) -> dict[str, Any]:
    """The training losses on held-out clips of 17 frames (or the whole latent frames in them) under
    the same draws for every model. The mask ratio is one for a batch: only figures of one batch
    size compare."""
    loss = model_loss(model, ModelTraining(steps=1, batch=batch)).eval()
    device = model.device
    t = model.config.autoencoder.temporal_compression
    sums: dict[str, float] = {}
    for first, given in batches(model, clips, batch, 1 + 16 // t * t):
        assert given.actions is not None
        actions = latent_actions(given.actions, t).to(device) if model.config.action_dim else None
        latents = encode_clips(model, given.frames)
        count = len(latents)
        draws = AlikeDraws(device, seed=0, step=first, clips=range(first, first + count))
        with torch.autocast(device.type, torch.bfloat16):
            terms = loss(latents, actions, draws)[1]
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + float(value) * count
        tick(count)
    return {**{name: total / clips for name, total in sums.items()}, "clips": clips, "batch": batch}


def measure_one_step(
    model: FrameModel,
    sampling: SamplingConfig,
    *,
    clips: int,
    context: int,
    batch: int,
    seed: int,
    tick: Callable[[int], None],
    predictor: Predictor | None = None,
) -> dict[str, Any]:
    """The next latent frame alone: predictions, the canvas alone, a copy of the last frame, and
    the truth through the autoencoder (no prediction can be nearer), each against the truth."""
    t = model.config.autoencoder.temporal_compression
    given = _given(model, context)
    gathered = {
        name: ToyTableEvaluator() for name in ("prediction", "canvas", "copy", "autoencoder")
    }
    for first, drawn in batches(model, clips, batch, given + t):
        assert drawn.actions is not None
        real, actions = drawn.frames[:, given:], drawn.actions[:, given - 1 :]
        before = drawn.frames[:, :given]
        shown = continue_clips(
            model,
            sampling,
            drawn,
            context=context,
            seed=seed,
            first_stream=first,
            canvas=True,
            predictor=predictor,
        )
        frames = {
            "prediction": shown.frames[:, given:],
            "canvas": shown.canvas,
            "copy": held(before, given, t),
            "autoencoder": reconstruct(model, drawn.frames)[:, given:],
        }
        for name, predicted in frames.items():
            if predicted is not None:
                gathered[name].update(before, predicted, real, actions)
        tick(len(real))
    keep = ("frechet", "gripper_penalised_px", "gripper_missing")
    result: dict[str, Any] = {"clips": clips, "context": context}
    for name, evaluator in gathered.items():
        if name != "canvas" or model.canvas is not None:
            report = dataclasses.asdict(evaluator.report())
            result[name] = {key: report[key] for key in keep}
    return result


def measure_rollouts(
    model: FrameModel,
    sampling: SamplingConfig,
    *,
    clips: int,
    frames: int,
    context: int,
    batch: int,
    seed: int,
    tick: Callable[[int], None],
    use_actions: bool = True,
    windows: tuple[tuple[int, int], ...] = (),
    predictor: Predictor | None = None,
) -> dict[str, Any]:
    """Predictions of `frames` pixel frames against the truth. `windows` (first, last), counted
    from 1 at the first predicted frame, add the Frechet distance of those parts alone, of the pairs
    of frames within them.

    Raises:
        InputError: if `frames` are not whole latent frames, or a window is not two of them or more.
    """
    given = _given(model, context)
    _check_predicted(model, frames)
    for start, end in windows:
        if not 1 <= start < end <= frames:
            raise InputError(f"window {start}-{end}: expected two or more of frames 1-{frames}")
    evaluator = ToyTableEvaluator()
    parts = {window: (GaussianStats(), GaussianStats()) for window in windows}
    for first, drawn in batches(model, clips, batch, given + frames):
        assert drawn.actions is not None
        shown = continue_clips(
            model,
            sampling,
            drawn,
            context=context,
            seed=seed,
            first_stream=first,
            use_actions=use_actions,
            predictor=predictor,
        ).frames
        real, shown = as_measured(drawn.frames), as_measured(shown)
        before, actions = real[:, :given], drawn.actions[:, given - 1 :]
        evaluator.update(before, shown[:, given:], real[:, given:], actions)
        for (start, end), sides in parts.items():
            for stats, clip in zip(sides, (real, shown), strict=True):
                window = clip[:, given + start - 1 : given + end]
                stats.update(pair_features(window).flatten(0, 1))
        tick(len(drawn.frames))
    report = {"context": context, **dataclasses.asdict(evaluator.report())}
    report["frechet_by_window"] = {
        f"{start}-{end}": real.distance(predicted)
        for (start, end), (real, predicted) in parts.items()
    }
    return report


ABLATIONS: dict[str, dict[str, Any]] = {
    "no canvas": {"order": "random", "temporal_guidance": 1.0, "canvas_guidance": 1.0},
    "canvas": {"order": "random", "temporal_guidance": 1.0, "canvas_guidance": 1.0},
    "canvas + motion order": {
        "order": "motion", "temporal_guidance": 1.0, "canvas_guidance": 1.0,
    },
    "full guidance": {"order": "motion"},
    "without canvas guidance": {"order": "motion", "canvas_guidance": 1.0},
    "without temporal guidance": {"order": "motion", "temporal_guidance": 1.0},
}  # fmt: skip
"""The curves of the paper's Figure 3 as changes of the sampling configuration: (a) and (b) are
without guidance, (c) removes one branch at a time."""


def measure_ablations(
    model: FrameModel,
    plain: FrameModel,
    sampling: SamplingConfig,
    *,
    steps: tuple[int, ...],
    seeds: int,
    clips: int,
    frames: int,
    context: int,
    batch: int,
    tick: Callable[[int], None],
    before: Callable[[dict[str, Any]], dict[str, Any]] = lambda result: {},
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Frechet distance against AR steps (Figure 3): `plain` is the no-canvas model. Every seed has
    clips of its own, the same for all curves; a point is the mean over seeds, with each seed's
    value beside it.

    Args:
        before: is given the result without its curves and returns those already measured, whose
            points are not measured again.
        keep: is given the result after every point.

    Raises:
        InputError: if `frames` are not whole latent frames.
        ConfigError: if the models do not fit together, or there are more steps than tokens.
    """
    if plain.canvas is not None or model.canvas is None:
        raise ConfigError("ablations: expected a model with a canvas, and the other one without")
    curves = {
        name: (
            plain if name == "no canvas" else model,
            dataclasses.replace(sampling, **changes),
        )
        for name, changes in ABLATIONS.items()
    }
    return measure_curves(
        curves, steps=steps, seeds=seeds, clips=clips, frames=frames, context=context, batch=batch,
        about={"no_canvas_weights": weights_id(plain)}, tick=tick, before=before, keep=keep,
    )  # fmt: skip


def measure_curves(
    models: Mapping[str, tuple[FrameModel, SamplingConfig]],
    *,
    steps: tuple[int, ...],
    seeds: int,
    clips: int,
    frames: int,
    context: int,
    batch: int,
    about: Mapping[str, Any],
    tick: Callable[[int], None],
    before: Callable[[dict[str, Any]], dict[str, Any]] = lambda result: {},
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Frechet distance against AR steps, a curve for each of `models`, which share clips and noise,
    and of a `copy` of the last frame given; other arguments as for `measure_ablations`, `about`
    being what else the result says.

    Raises:
        InputError: if `frames` are not whole latent frames.
        ConfigError: if the models do not fit together, or there are more steps than tokens.
    """
    model = next(iter(models.values()))[0]
    if any(other.config.autoencoder != model.config.autoencoder for other, _ in models.values()):
        raise ConfigError("the models have autoencoders of different configurations")
    _check_predicted(model, frames)
    points: dict[tuple[str, int], tuple[FrameModel, SamplingConfig]] = {}
    for name, (network, chosen) in models.items():
        for k in steps:
            set_sizes(network.config.tokens, k)
            points[name, k] = network, dataclasses.replace(chosen, ar_steps=k)
    given = _given(model, context)
    result: dict[str, Any] = {
        "clips": clips,
        "frames": frames,
        "context": context,
        "seeds": seeds,
        **about,
    }
    found = before(result)
    curves = result["curves"] = {name: dict(found.get(name, {})) for name in models}

    def features(shown: Tensor) -> Tensor:
        return pair_features(shown[:, given - 1 :]).flatten(0, 1)

    @functools.cache
    def truth(seed: int) -> tuple[list[tuple[int, Clips]], GaussianStats]:
        """The clips of a seed, drawn once for all points, and their statistics."""
        drawn: list[tuple[int, Clips]] = []
        stats = GaussianStats()
        for first, part in batches(model, clips, batch, given + frames, start=seed * clips):
            drawn.append((first, part))
            stats.update(features(part.frames))
        return drawn, stats

    def distance(seed: int, predict: Callable[[int, Clips], Tensor]) -> float:
        """Of what is predicted for the clips of a seed, of which the first's number is given."""
        predicted, (drawn, real) = GaussianStats(), truth(seed)
        for first, part in drawn:
            predicted.update(features(predict(first, part)))
        return real.distance(predicted)

    def continued(
        network: FrameModel, chosen: SamplingConfig, seed: int, first: int, part: Clips
    ) -> Tensor:
        shown = continue_clips(
            network, chosen, part, context=context, seed=seed, first_stream=first
        )
        tick(len(part.frames))
        return shown.frames

    def copied(first: int, part: Clips) -> Tensor:
        return torch.cat([part.frames[:, :given], held(part.frames, given, frames)], dim=1)

    result["copy"] = sum(distance(seed, copied) for seed in range(seeds)) / seeds
    for (name, k), (network, chosen) in points.items():
        if str(k) in curves[name]:
            tick(clips * seeds)
            continue
        distances = [
            distance(seed, functools.partial(continued, network, chosen, seed))
            for seed in range(seeds)
        ]
        curves[name][str(k)] = {"mean": sum(distances) / seeds, "seeds": distances}
        curves[name] = dict(sorted(curves[name].items(), key=lambda point: int(point[0])))
        keep(result)
    return result


# -- commands


@app.command()
def reconstruction(
    checkpoint: Checkpoint,
    output: Output,
    clips: Clip = 256,
    frames: Annotated[int, typer.Option(min=1)] = 17,
    batch: Batch = 16,
    device: Device = "cpu",
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """PSNR of held-out clips through the autoencoder."""
    model, _ = _load_toytable(checkpoint, output, device, threads, None)
    with _ticking("reconstruction", clips, quiet) as tick:
        result = measure_reconstruction(model, clips=clips, frames=frames, batch=batch, tick=tick)
    _write(output, "reconstruction", model, None, result, quiet)


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
    with _ticking("losses", clips, quiet) as tick:
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
    with _ticking("one step", clips, quiet) as tick:
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
    with _ticking("rollouts", len(modes) * clips, quiet) as tick:
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
    with _ticking("long rollouts", clips, quiet) as tick:
        result = measure_rollouts(
            model, sampling, clips=clips, frames=frames, context=context, batch=batch,
            seed=seed, tick=tick, windows=((5, 20), (frames - 15, frames)), predictor=predictor,
        )  # fmt: skip
    _write(output, "long", model, sampling, result, quiet, engine)


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
        loaded[name] = _load_toytable(Path(path), output, device, threads, set_)
    counts = _step_counts(steps)
    (first, sampling), *_ = loaded.values()
    about = {
        "models": {
            name: {
                "weights": weights_id(model),
                "family": model.config.family,
                "group": model.config.group,
                "parameters": sum(
                    n for part, n in count_parameters(model.config).items() if part != "autoencoder"
                ),
            }
            for name, (model, _) in loaded.items()
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

    with _ticking(what, points, quiet) as tick:
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
    model, sampling = _load_toytable(checkpoint, output, device, threads, set_, set_model)
    _check_predicted(model, frames)
    given = _given(model, context)
    drawn = held_out(first, clips, given + frames, model.config.autoencoder.height)
    shown = continue_clips(
        model, sampling, drawn, context=context, seed=seed, first_stream=first
    ).frames
    picks = range(given - 1, given + frames, every)
    rows = [
        (f"{label} {first + i}", [np.asarray(side[i, j]) for j in picks])
        for i in range(clips)
        for label, side in (("true", drawn.frames), ("predicted", shown))
    ]
    columns = ["given", *(str(j - given + 1) for j in picks[1:])]
    data = io.BytesIO()
    Image.fromarray(contact_sheet(rows, columns=columns, scale=1)).save(data, "PNG")
    write_file(output, data.getvalue())


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
    workers: Annotated[int, typer.Option(min=1, help="Threads that read clips.")] = 1,
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
    source = make_source(
        data or {"bair": "bair-tfrecord"}.get(usual, usual),
        root,
        frames=chosen.conditioning + chosen.predicted,
        height=model.config.autoencoder.height,
        width=model.config.autoencoder.width,
        seed=seed,
        split=split,
        workers=workers,
    )
    places = clips or (chosen.videos or len(source)) * chosen.places
    with _ticking(name, places * (samples or chosen.samples), quiet) as tick:
        result = measure_protocol(
            model, sampling, chosen, source, features, lpips=distance, clips=clips,
            samples=samples, batch=batch, seed=seed, tick=tick,
        )  # fmt: skip
    result["i3d_sha256"] = hashlib.sha256(i3d.read_bytes()).hexdigest()
    _write(output, "protocol", model, sampling, result, quiet)
    for recording, reason in list(source.skipped.items())[:1]:
        left = len(source.skipped)
        typer.echo(f"left out {left} recordings, the first: {recording}: {reason}", err=True)


# -- files


def _load(
    checkpoint: Path, output: Path, device: str, threads: int | None, assignments: list[str] | None
) -> tuple[FrameModel, SamplingConfig]:
    """Model and sampling options; what hours of work would end in is checked first."""
    check_writable(output)
    if threads is not None:
        torch.set_num_threads(threads)
    model, sampling = load_weights(checkpoint)
    sampling = override(sampling, assignments)
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
) -> tuple[FrameModel, SamplingConfig]:
    model, sampling = _load(checkpoint, output, device, threads, assignments)
    ae, actions = model.config.autoencoder, model.config.action_dim // model.config.group
    if {ae.height, ae.width} != {METRIC_SIZE} or actions not in (0, 2 * ae.temporal_compression):
        raise ConfigError(
            f"{checkpoint}: ToyTable has 64x64 pixels and {2 * ae.temporal_compression} numbers of "
            f"action a latent step; the model takes {ae.height}x{ae.width} and {actions}"
        )
    if model_assignments:
        config = override(model.config, model_assignments)
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


@contextmanager
def _ticking(name: str, total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    with progress_bar(name, total, quiet) as advance:
        yield lambda done: advance(done, None)


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
        raise InputError(f"{path}: not written by `python -m training.evaluation ablations`")
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
