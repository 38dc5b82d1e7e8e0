"""The `canvasmar-rt` command. A user's mistake is one line on stderr and exit status 2."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from canvasmar_rt import __version__
from canvasmar_rt.bundle import DEMO_CLIP, Bundle, packaged_names
from canvasmar_rt.command import print_error, run_command, stderr, stderr_bar
from canvasmar_rt.config import PRESETS, SamplingConfig, from_dict, parsed, preset, to_dict
from canvasmar_rt.errors import CanvasMarError, ConfigError, InputError, need, need_torch
from canvasmar_rt.files import check_writable, write_file
from canvasmar_rt.rollout import Predictor, load
from canvasmar_rt.service.settings import Settings

DEFAULT_MODEL = "toytable-int8"
"""The faster of the packaged bundles; on a GPU it is `GPU_MODEL`."""
GPU_MODEL = "toytable"

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Masked-autoregressive video prediction: export, verify, predict, measure.",
)
stdout = Console(emoji=False)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]
Engine = Annotated[str, typer.Option(help="onnxruntime, torch or tensorrt.")]
EngineOption = Annotated[
    list[str] | None,
    typer.Option(
        "--engine-option", metavar="NAME=VALUE",
        help="An option of the engine, such as cuda_graph=false or engine_dir=DIR.",
    ),
]  # fmt: skip
Device = Annotated[str, typer.Option(help="Where the engine runs: cpu, cuda or cuda:<index>.")]
Threads = Annotated[
    int | None, typer.Option(help="CPU threads; the engine's default if not given.")
]
Model = Annotated[
    str | None,
    typer.Option(
        help=f"Bundle directory, or the name of a packaged one; by default {DEFAULT_MODEL}, on a "
        f"GPU {GPU_MODEL}.",
        show_default=False,
    ),
]
Steps = Annotated[int | None, typer.Option(help="AR steps of a latent frame.")]
FlowSteps = Annotated[int | None, typer.Option(help="Steps of the flow solver.")]
Solver = Annotated[str | None, typer.Option(help="Flow solver: euler, heun or ab2.")]
TemporalGuidance = Annotated[float | None, typer.Option(help="w_t of eq. 8; 1 turns it off.")]
CanvasGuidance = Annotated[float | None, typer.Option(help="w_s of eq. 8; 1 turns it off.")]
Profile = Annotated[
    str | None,
    typer.Option(help="Sampling of the bundle: default, or fast, which is taken if there is one."),
]
Order = Annotated[str | None, typer.Option(help="Token order: motion, maskgit or random.")]
Origin = Annotated[
    list[str] | None,
    typer.Option(
        help="A web page of another server that may connect, such as https://game.example; '*': "
        "all of them. Repeat as needed."
    ),
]
Output = Annotated[
    Path,
    typer.Option(
        "--output", "-o", help=".mp4, .gif, or .png for numbered frames; for many clips a folder."
    ),
]
Frames = Annotated[int, typer.Option(help="Pixel frames to predict.")]
Seed = Annotated[int, typer.Option(help="Same seed, same video, on every engine.")]
Batch = Annotated[int, typer.Option(help="Futures to predict at once.")]


def main() -> None:
    """Entry point of the console script."""
    run_command(app)


@contextmanager
def _steps_shown(quiet: bool) -> Iterator[Callable[[str], None]]:
    """A spinner with the current step, for work whose length is not known."""
    if quiet:
        yield lambda _: None
        return
    with stderr.status("starting") as status:
        yield lambda text: status.update(escape(text))


def _table(title: str | None, *columns: str, numbers: tuple[str, ...] = ()) -> Table:
    """A table for any width: text goes on in a further line, and columns of numbers stay whole."""
    table = Table(title=title)
    for name in columns:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, no_wrap=True)
    return table


def _sampling(base: SamplingConfig, **given: Any) -> SamplingConfig:
    return dataclasses.replace(base, **{k: v for k, v in given.items() if v is not None})


def _named(base: SamplingConfig, given: list[str] | None) -> SamplingConfig | None:
    """Sampling options with those given as NAME=VALUE; None where none are.

    Raises:
        ConfigError: for an option there is not, or a value it cannot have.
    """
    if not given:
        return None
    return from_dict(SamplingConfig, to_dict(base) | dict(parsed(given)), "sampling")


def _model(given: str | None, device: str) -> str:
    if given is not None:  # "", as of a variable that is not set, is no name
        return given
    return DEFAULT_MODEL if device == "cpu" else GPU_MODEL


def _version(value: bool) -> None:
    if value:
        stdout.print(f"canvasmar-rt {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def predict(
    source: Annotated[Path, typer.Argument(help="A video, a folder, or an .npz of frames.")],
    output: Output,
    model: Model = None,
    profile: Profile = None,
    frames: Frames = 16,
    context: Annotated[int, typer.Option(help="Pixel frames of the clip to start from.")] = 5,
    steps: Steps = None,
    flow_steps: FlowSteps = None,
    solver: Solver = None,
    temporal_guidance: TemporalGuidance = None,
    canvas_guidance: CanvasGuidance = None,
    order: Order = None,
    seed: Seed = 0,
    batch: Batch = 1,
    fps: Annotated[
        float | None, typer.Option(help="Sampling rate; the model's by default.")
    ] = None,
    start: Annotated[float, typer.Option(help="Second of the clip to start at.")] = 0.0,
    actions: Annotated[bool, typer.Option(help="Use the actions kept with the clip.")] = False,
    engine: Engine = "onnxruntime",
    engine_option: EngineOption = None,
    device: Device = "cpu",
    threads: Threads = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Continue a real clip and write the video and a contact sheet."""
    from canvasmar_rt.predict import PredictOptions, video_names
    from canvasmar_rt.video import find_clips

    predictor = load(
        _model(model, device), engine=engine, device=device, threads=threads, profile=profile,
        **_engine_options(engine_option),
    )  # fmt: skip
    sampling = _sampling(
        predictor.sampling, ar_steps=steps, flow_steps=flow_steps, solver=solver, order=order,
        temporal_guidance=temporal_guidance, canvas_guidance=canvas_guidance,
    )  # fmt: skip
    options = PredictOptions(
        frames=frames, context=context, seed=seed, batch=batch, fps=fps, start=start,
        actions=actions, sampling=sampling,
    )  # fmt: skip
    clips = find_clips(source)
    if len(clips) == 1 and output.suffix and not output.is_dir():
        _predict_one(predictor, clips[0], output, options, json_, quiet)
        return
    failed = 0
    for clip, target in video_names(clips, output).items():
        try:
            _predict_one(predictor, clip, target, options, json_, quiet)
        except CanvasMarError as error:
            failed += 1
            print_error(error)
    if failed:
        stderr.print(f"{failed} of {len(clips)} clips failed")
        raise typer.Exit(1)


def _predict_one(
    predictor: Predictor, clip: Path, output: Path, options: Any, as_json: bool, quiet: bool
) -> None:
    from canvasmar_rt.predict import predict_clip

    with stderr_bar(quiet or as_json) as bar:
        task = bar.add_task(escape(clip.name), total=None)
        summary = predict_clip(
            predictor, clip, output, options,
            lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    if as_json:
        print(json.dumps(summary))
    elif not quiet:
        for note in summary["notes"]:
            stderr.print(f"note: {escape(note)}", soft_wrap=True)
        milliseconds = 1000 * summary["seconds_per_latent_frame"]
        stdout.print(
            f"{escape(_files(summary['output']))}\n{escape(summary['sheet'])}\n"
            f"{summary['context_frames']} context frames, {summary['predicted_frames']} predicted "
            f"by {escape(summary['bundle'])} on {summary['engine']}/{summary['device']} "
            f"({summary['ar_steps']} AR, {summary['flow_steps']} flow steps), "
            f"{milliseconds:.0f} ms a latent frame",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


def _files(paths: list[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} to {paths[-1]} ({len(paths)} files)"


@app.command()
def demo(
    output: Output = Path("canvasmar_demo.mp4"),
    frames: Frames = 16,
    seed: Seed = 0,
    batch: Batch = 1,
    engine: Engine = "onnxruntime",
    profile: Profile = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run the packaged model on the packaged clip."""
    predictor = load(DEFAULT_MODEL, engine=engine, profile=profile)
    from canvasmar_rt.predict import PredictOptions

    options = PredictOptions(
        frames=frames, seed=seed, batch=batch, actions=bool(predictor.config.action_dim)
    )
    _predict_one(predictor, DEMO_CLIP, output, options, json_, quiet)
    if not (json_ or quiet):
        stdout.print(f"weights: {escape(predictor.bundle.manifest.source)}", highlight=False)


@app.command()
def verify(
    bundle: Annotated[str, typer.Argument(help="Bundle directory or packaged name.")],
    engine: Engine = "onnxruntime",
    engine_option: EngineOption = None,
    device: Device = "cpu",
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check a bundle's hashes, then its parity with PyTorch on this machine and engine."""
    from canvasmar_rt.verify import verify as run

    with _steps_shown(quiet or json_) as progress:
        report = run(
            bundle, engine=engine, device=device, progress=progress,
            **_engine_options(engine_option),
        )  # fmt: skip
    if json_:
        print(json.dumps(report))
    elif not quiet:
        table = _table(
            escape(report["bundle"]), "component", numbers=("max abs", "relative", "cosine")
        )
        for name, d in report["components"].items():
            table.add_row(name, f"{d['max_abs']:.2e}", f"{d['relative']:.2e}", f"{d['cosine']:.7f}")
        stdout.print(table)
        for name, why in report["omitted"].items():
            stdout.print(f"{name} is not run here: {why}", highlight=False)
        stdout.print(
            f"rollout of {len(report['drift'])} frames: largest difference "
            f"{max(report['drift']):.2e} (tolerance {report['drift_tolerance']:.0e}), "
            f"{report['flipped_orders']} frames put tokens in another order\n"
            f"within tolerance on {report['engine']}/{report['device']}",
            highlight=False,
        )  # fmt: skip


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="A preset, or a checkpoint directory.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Bundle directory to write.")],
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "fp32",
    weights: Annotated[str, typer.Option(help="fp16 halves the files of an fp32 bundle.")] = "",
    quantize: Annotated[
        str, typer.Option(help="int8: matrix products in 8 bits, for the CPU; or none.")
    ] = "none",
    opset: Annotated[
        int, typer.Option(help="20, 23 or 24; by default 20 for fp32, else 23.", show_default=False)
    ] = 0,
    batch_min: Annotated[int, typer.Option(help="Smallest batch.")] = 1,
    batch_opt: Annotated[
        int | None, typer.Option(help="Batch engines are tuned for; the smallest.")
    ] = None,
    batch_max: Annotated[int, typer.Option(help="Largest batch.")] = 32,
    steps: Steps = None,
    flow_steps: FlowSteps = None,
    solver: Solver = None,
    temporal_guidance: TemporalGuidance = None,
    canvas_guidance: CanvasGuidance = None,
    order: Order = None,
    seed: Annotated[int, typer.Option(help="Seed of a preset's random weights.")] = 0,
    drift_frames: Annotated[
        int, typer.Option(help="Latent frames of the rollout compared with PyTorch.")
    ] = 32,
    fast: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="A sampling option of the bundle's fast profile; repeat."
        ),
    ] = None,
    unroll: Annotated[
        bool,
        typer.Option("--unroll", help="No loop over flow steps: for ONNX Runtime's CUDA graphs."),
    ] = False,
    card: Annotated[
        Path | None, typer.Option(help="Markdown to put into the bundle's model card.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Export a model to a verified bundle (needs the `export` extra)."""
    if source not in PRESETS and not Path(source).is_dir():
        raise ConfigError(
            f"{source}: neither a preset ({', '.join(PRESETS)}) nor a checkpoint directory"
        )
    try:
        text = "" if card is None else card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--card {card}: cannot be read as text ({error})") from None
    need_torch("export")
    from canvasmar_rt.bundle import BatchRange
    from canvasmar_rt.export.exporter import ExportOptions, check_free, export_bundle
    from canvasmar_rt.models.checkpoint import load_checkpoint
    from canvasmar_rt.models.families import build

    check_free(output, force)  # before a model of gigabytes is made
    model = None
    if Path(source).is_dir():  # also of a preset's name
        model, base = load_checkpoint(Path(source))
        origin = f"checkpoint {Path(source).resolve().name}"
    else:
        config, base = preset(source)
        origin = f"preset {source}, random weights, seed {seed}"
    sampling = _sampling(
        base, ar_steps=steps, flow_steps=flow_steps, solver=solver, order=order,
        temporal_guidance=temporal_guidance, canvas_guidance=canvas_guidance,
    )  # fmt: skip
    options = ExportOptions(
        dtype=dtype, weights=weights, quantize=quantize, opset=opset, seed=seed,
        drift_frames=drift_frames, card=text, unroll=unroll, fast=_named(sampling, fast),
        batch=BatchRange(
            minimum=batch_min,
            optimum=batch_min if batch_opt is None else batch_opt,
            maximum=batch_max,
        ),
    )  # fmt: skip
    with _steps_shown(quiet or json_) as progress:
        bundle = export_bundle(
            model or build(config, seed),
            sampling,
            output,
            options,
            source=origin,
            force=force,
            progress=progress,
        )
    parity = bundle.manifest.parity
    assert parity is not None
    size = sum(entry.bytes for entry in bundle.manifest.files.values())
    worst = max(d.relative for d in parity.components.values())
    if json_:
        print(json.dumps({
            "bundle": str(output), "bytes": size, "largest_relative_difference": worst,
            "largest_drift": max(parity.drift), "parity_engine": parity.engine,
        }))  # fmt: skip
    elif not quiet:
        stdout.print(
            f"{escape(str(output))}: {len(bundle.manifest.components)} graphs, "
            f"{size / 1e6:.1f} MB, from {escape(origin)}\n"
            f"parity with PyTorch ({escape(parity.engine)}): components within {worst:.1e}, "
            f"{len(parity.drift)}-frame rollout within {max(parity.drift):.1e}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


PAPER_TOTALS = {
    "bair": (
        211e6,
        "Table 3 does not say what it counts. The layers it lists make the total without the "
        "autoencoder; what is missing, 38M, is of the size of a video autoencoder (13.6M here). "
        "What the paper's has is not said.",
    ),
    "ucf101": (
        733e6,
        "Table 3 gives the total of kinetics600, whose MM-DiT doubles the Spatial MAR. With expert "
        "norms, which add less than 0.5M, the layers it lists make far less: the difference is "
        "those 200M of MM-DiT weights.",
    ),
    "kinetics600": (
        733e6,
        "The total without the autoencoder is within 1% of Table 3: 201.7M of it are the second "
        "stream of MM-DiT weights in all 16 spatial layers.",
    ),
}


@app.command()
def info(
    source: Annotated[str, typer.Argument(help="A preset, a bundle, or a packaged name.")],
    json_: Json = False,
) -> None:
    """Sizes of a preset (parameters beside the paper's Table 3), or contents of a bundle. A name
    that is both, as toytable is, is the packaged bundle."""
    if source in PRESETS and source not in packaged_names() and not Path(source).is_dir():
        _preset_info(source, json_)
    else:
        _bundle_info(Bundle.open(source), json_)


def _preset_info(name: str, as_json: bool) -> None:
    need_torch("info on a preset")
    from canvasmar_rt.models.families import count_parameters

    config, sampling = preset(name)
    counts = count_parameters(config)
    total = sum(counts.values())
    paper, why = PAPER_TOTALS.get(name, (None, ""))
    if as_json:
        print(json.dumps({
            "preset": name, "parameters": counts, "total": total, "paper_total": paper, "note": why,
            "model": dataclasses.asdict(config), "sampling": dataclasses.asdict(sampling),
        }))  # fmt: skip
        return
    table = _table(name, "module", numbers=("parameters",))
    for module, count in counts.items():
        table.add_row(module, f"{count / 1e6:.1f}M")
    table.add_section()
    table.add_row("without autoencoder", f"{(total - counts['autoencoder']) / 1e6:.1f}M")
    table.add_row("total", f"{total / 1e6:.1f}M")
    if paper is not None:
        table.add_row("paper, Table 3", f"{paper / 1e6:.0f}M")
    stdout.print(table)
    if why:
        stdout.print(why)


def _steps_text(sampling: SamplingConfig) -> str:
    return f"{sampling.ar_steps} AR steps, {sampling.flow_steps} flow steps of {sampling.solver}"


def _bundle_info(bundle: Bundle, as_json: bool) -> None:
    manifest = bundle.manifest
    if as_json:
        print(json.dumps(dataclasses.asdict(manifest)))
        return
    table = _table(escape(str(bundle.path)), "component", "file", numbers=("inputs", "outputs"))
    for name, c in manifest.components.items():
        table.add_row(name, c.file, str(len(c.inputs)), str(len(c.outputs)))
    stdout.print(table)
    ae = manifest.model.autoencoder
    products = "" if manifest.quantization == "none" else f"products {manifest.quantization}, "
    stdout.print(
        f"{escape(manifest.model.name)}: {escape(manifest.source)}; {manifest.dtype}, weights "
        f"{manifest.weights_dtype}, {products}opset {manifest.opset}, batch "
        f"{manifest.batch.minimum} to {manifest.batch.maximum}\n"
        f"{ae.width}x{ae.height} pixels at {manifest.model.fps:g} fps, "
        f"{manifest.model.step_frames} frames a step, actions "
        f"{manifest.model.action_dim or 'none'}, {_steps_text(manifest.sampling)}"
        + (f" (fast: {_steps_text(manifest.fast)})" if manifest.fast else ""),
        highlight=False,
    )  # fmt: skip


@app.command()
def build(
    bundle: Annotated[str, typer.Argument(help="Bundle directory or packaged name.")],
    engine_dir: Annotated[Path, typer.Option(help="Folder of the engines.")],
    timing_cache: Annotated[
        Path | None, typer.Option(help="File that keeps kernel timings from build to build.")
    ] = None,
    optimization_level: Annotated[
        int, typer.Option(help="0 (quick to build) to 5 (most kernels tried).")
    ] = 3,
    batch_min: Annotated[int | None, typer.Option(help="Smallest batch; the bundle's.")] = None,
    batch_opt: Annotated[int | None, typer.Option(help="Batch to tune for; the bundle's.")] = None,
    batch_max: Annotated[int | None, typer.Option(help="Largest batch; the bundle's.")] = None,
    force_rebuild: Annotated[
        bool, typer.Option("--force-rebuild", help="Build what would be reused, too.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be built, and why.")
    ] = False,
    device: Annotated[str, typer.Option(help="The GPU: cuda or cuda:<index>.")] = "cuda",
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Build TensorRT engines of a bundle for a GPU of this machine."""
    from canvasmar_rt.bundle import BatchRange
    from canvasmar_rt.engines.tensorrt_build import BuildOptions, build_engines

    opened = Bundle.open(bundle)
    own = opened.manifest.batch
    low = own.minimum if batch_min is None else batch_min
    high = own.maximum if batch_max is None else batch_max
    tuned = min(max(own.optimum, low), high) if batch_opt is None else batch_opt
    options = BuildOptions(
        batch=BatchRange(minimum=low, optimum=tuned, maximum=high),
        timing_cache=timing_cache, optimization_level=optimization_level,
        force_rebuild=force_rebuild, dry_run=dry_run,
    )  # fmt: skip
    with stderr_bar(quiet or json_) as bar:
        task = bar.add_task("", total=None)
        report = build_engines(
            opened, engine_dir, options,
            lambda component, done, total: bar.update(
                task, description=component, completed=done, total=total
            ),
            device=device,
        )  # fmt: skip
    if json_:
        print(json.dumps(dataclasses.asdict(report), default=str))
    elif not quiet:
        table = _table(escape(str(report.directory)), "component", "", "why", numbers=("s",))
        for part in report.components:
            why = escape("; ".join(part.reasons))
            table.add_row(part.component, part.action, why, f"{part.seconds:.1f}")
        stdout.print(table)
        for note in report.notes:
            stdout.print(escape(note), highlight=False)


def _engine_options(given: list[str] | None) -> dict[str, Any]:
    """NAME=VALUE options; true and false are switches.

    Raises:
        ConfigError: without an equals sign.
    """
    options: dict[str, Any] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise ConfigError(f"--engine-option takes NAME=VALUE, got {text!r}")
        if name in ("path_or_name", "engine", "device", "threads", "profile"):
            raise ConfigError(f"--engine-option {name}: has an option of its own, --{name}")
        options[name] = {"true": True, "false": False}.get(value, value)
    return options


@app.command()
def bench(
    model: Model = None,
    preset_: Annotated[
        str | None,
        typer.Option("--preset", help="A preset with random weights in place of a bundle."),
    ] = None,
    scale: Annotated[int, typer.Option(help="Divide every width of the preset by this.")] = 1,
    batch: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1",
    baseline: Annotated[
        str,
        typer.Option(help="Systems to set beside ours, comma-separated; 'list' names them."),
    ] = "",
    sweep: Annotated[
        str | None,
        typer.Option(
            metavar="OPTION=VALUES", help="Ours at several ar_steps, flow_steps or history=1,2,4."
        ),
    ] = None,
    engine: Engine = "onnxruntime",
    engine_option: EngineOption = None,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="Of a preset: fp32, fp16 or bf16.")] = "fp32",
    quantize: Annotated[str, typer.Option(help="Of a preset: none or int8.")] = "none",
    threads: Threads = None,
    profile: Profile = None,
    steps: Steps = None,
    flow_steps: FlowSteps = None,
    solver: Solver = None,
    temporal_guidance: TemporalGuidance = None,
    canvas_guidance: CanvasGuidance = None,
    order: Order = None,
    context: Annotated[int, typer.Option(help="Latent frames the clips start from.")] = 2,
    frames: Annotated[
        int | None, typer.Option(help="Latent frames of a clip; by default the rest of the window.")
    ] = None,
    warmup: Annotated[int, typer.Option(help="Untimed clips.")] = 2,
    iterations: Annotated[int, typer.Option(help="Timed clips.")] = 10,
    soak: Annotated[int, typer.Option(help="Frames to run for the memory check; 0: none.")] = 0,
    seed: Seed = 0,
    json_: Annotated[Path | None, typer.Option("--json", help="JSON file to write.")] = None,
    csv: Annotated[Path | None, typer.Option(help="CSV file to write.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Folder for pictures.")] = None,
    quiet: Quiet = False,
) -> None:
    """Measure latency on this machine, beside other systems, interleaved."""
    from canvasmar_rt.benchmarks import baselines, random_models, report
    from canvasmar_rt.benchmarks.dfot import check_frames
    from canvasmar_rt.benchmarks.latency import BenchOptions
    from canvasmar_rt.benchmarks.latency import bench as run

    if baseline == "list":
        for name, what in baselines.BASELINES.items():
            stdout.print(f"{name}: {what}", highlight=False, soft_wrap=True)
        return
    try:
        batches = tuple(int(b) for b in batch.split(","))
    except ValueError:
        raise ConfigError(f"--batch takes numbers such as 1,8,32; got {batch!r}") from None
    options = BenchOptions(
        batches=batches, baselines=tuple(b for b in baseline.split(",") if b), context=context,
        frames=frames, warmup=warmup, iterations=iterations, soak=soak, seed=seed,
    )  # fmt: skip
    if json_ is not None and csv is not None and json_.resolve() == csv.resolve():
        raise ConfigError("bench: give --json and --csv two files")
    for path in (json_, csv):
        if path is None or plot is None or path.suffix.lower() != ".png":
            continue
        if path.resolve().parent == plot.resolve():  # a picture would take its place
            raise ConfigError(f"bench: {path} lies where --plot draws; name it .json or .csv")
    for path in (json_, csv, plot and plot / "first_frame.png"):
        if path is not None:
            check_writable(path)
    if plot is not None:
        report.check_matplotlib()
    loading: dict[str, Any] = {
        "engine": engine,
        "device": device,
        "threads": threads,
        "profile": profile,
    }
    loading |= _engine_options(engine_option)
    if preset_ is not None and model is not None:
        raise ConfigError("bench: give --model or --preset, not both")
    cores = os.cpu_count()
    if threads is not None and cores is not None and threads > cores and not quiet:
        stderr.print(f"note: {threads} threads share {cores} cores, and wait for each other")
    with ExitStack() as stack:
        source: str | Path = _model(model, device)
        if preset_ is not None:
            config, base = preset(preset_)
            with _steps_shown(quiet) as shown:
                source = stack.enter_context(
                    random_models.random_bundle(
                        random_models.scaled(config, scale), base, shown, dtype=dtype,
                        quantize=quantize,
                    )
                )  # fmt: skip
        elif (scale, dtype, quantize) != (1, "fp32", "none"):
            raise ConfigError("--scale, --dtype and --quantize are for a --preset")
        predictor = load(source, **loading)
        sampling = _sampling(
            predictor.sampling, ar_steps=steps, flow_steps=flow_steps, solver=solver, order=order,
            temporal_guidance=temporal_guidance, canvas_guidance=canvas_guidance,
        )  # fmt: skip
        predictor = Predictor(predictor.engine, sampling)
        others = baselines.baselines(predictor, options.baselines, seed=seed, threads=threads)
        if any(name.startswith("dfot") for name in options.baselines):  # before it is exported
            window, played = predictor.config.context_frames, options.predicted(predictor.config)
            check_frames(window, context, played)
        if sweep is not None:
            others |= baselines.sweep(
                predictor, sweep, seed=seed, beside="unified" in options.baselines
            )

        def keep(found: dict[str, Any]) -> None:
            found["config"]["loading"] = loading
            if json_ is not None:
                write_file(json_, json.dumps(found, indent=1) + "\n")
            if csv is not None:
                write_file(csv, report.as_csv(found))

        whole: dict[str, Any] | None = None

        def so_far(found: dict[str, Any]) -> None:
            nonlocal whole
            whole = found

        with stderr_bar(quiet) as bar:
            task = bar.add_task("", total=None)
            try:
                measured = run(
                    predictor, options, others,
                    lambda what, done, total: bar.update(
                        task, description=what, completed=done, total=total
                    ),
                    so_far,
                )  # fmt: skip
            except BaseException:  # what was measured by then is not lost
                if whole is not None:
                    keep(whole)
                    if json_ or csv:
                        stderr.print("batches measured by then are kept")
                raise
    keep(measured)
    if not quiet:
        stdout.print(report.table(measured))
        if "soak" in measured:
            soaked = measured["soak"]
            stdout.print(
                f"soak of {soaked['frames']} frames: resident memory "
                f"{soaked['resident_mb_at_end']:.1f} MB, {soaked['growth']:+.2%} since frame 100",
                highlight=False,
            )  # fmt: skip
    if plot is not None:  # after the table: a picture that fails must not cost it
        for name, png in report.pictures(measured).items():
            write_file(plot / name, png)


@app.command()
def serve(
    model: Model = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 is every one of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    slots: Annotated[
        int, typer.Option(help="Sessions predicted at once, as one batch.")
    ] = Settings.slots,
    max_sessions: Annotated[
        int, typer.Option(help="Clients at once; those beyond the slots wait for a place.")
    ] = Settings.max_sessions,
    fps: Annotated[
        float | None, typer.Option(help="Pixel frames a second; the model's by default.")
    ] = None,
    budget_ms: Annotated[
        float | None,
        typer.Option(help="From a tick's start to its frames; 80% of a tick by default."),
    ] = None,
    action_limit: Annotated[
        float, typer.Option(help="Largest number in an action, in the training data's units.")
    ] = Settings.action_limit,
    clip: Annotated[
        Path | None, typer.Option(help="What to cut start pictures from; the packaged clip.")
    ] = None,
    origin: Origin = None,
    seed: Seed = Settings.seed,
    engine: Engine = "onnxruntime",
    engine_option: EngineOption = None,
    device: Device = "cpu",
    threads: Threads = None,
    profile: Profile = None,
    quiet: Quiet = False,
) -> None:
    """Play the learned world in a browser; several sessions share a batch (the `serve` extra)."""
    need("serve", "serve", "fastapi", "uvicorn", "websockets", "prometheus_client")
    from canvasmar_rt.service.server import run

    settings = Settings(
        slots=slots, max_sessions=max_sessions, fps=fps, budget_ms=budget_ms,
        action_limit=action_limit, clip=clip or DEMO_CLIP, seed=seed,
        origins=tuple(origin or ()),
    )  # fmt: skip
    predictor = load(
        _model(model, device), engine=engine, device=device, threads=threads, profile=profile,
        **_engine_options(engine_option),
    )  # fmt: skip
    if not quiet:
        stderr.print("measuring what fits into a tick")

    def ready(url: str) -> None:
        if not quiet:
            stdout.print(f"{url} (Ctrl-C ends it)", highlight=False)

    run(predictor, settings, host=host, port=port, ready=ready)


@app.command()
def doctor(json_: Json = False) -> None:
    """Say what this machine can run, what is missing, and how to fix it."""
    from canvasmar_rt.doctor import examine

    findings = examine()
    if json_:
        print(json.dumps([dataclasses.asdict(f) for f in findings]))
    else:
        table = _table(None, "", "what", "found")
        colours = {"ok": "green", "missing": "yellow", "problem": "red"}
        for f in findings:
            table.add_row(f"[{colours[f.status]}]{f.status}[/]", f.name, escape(f.detail))
        stdout.print(table)
        for f in findings:
            if f.fix:  # whole, to be copied
                stdout.print(f"{f.name}: {f.fix}", markup=False, highlight=False, soft_wrap=True)
    if any(f.status == "problem" for f in findings):
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
