"""`python -m training`: train the autoencoder, encode a data set, train CanvasMAR.

One process a GPU: start the stages with `torchrun --nproc-per-node N -m training ...`.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from canvasmar_rt.command import print_error, run_command, stderr
from canvasmar_rt.config import ModelConfig
from canvasmar_rt.errors import ConfigError, EngineError, InputError

try:
    import torch

    from canvasmar_rt.models.canvasmar import FrameModel
    from canvasmar_rt.models.families import build
    from training import stages
    from training.clips import (
        AheadSource,
        Clips,
        ClipSource,
        LatentSource,
        ToyTableSource,
        check_length,
        write_latents,
    )
    from training.config import RECIPES, Recipe, recipe
    from training.datasets import READERS, DataSet
    from training.losses import open_skips, zero_outputs
    from training.options import SetData, override
    from training.trainer import (
        Ranks,
        Trainer,
        find_checkpoints,
        load_weights,
        process_group,
        progress_bar,
    )
    from training.transfer import transfer, translate
except ImportError as missing:
    print_error(
        EngineError(f'training needs PyTorch and more ({missing}): pip install -e ".[train]"')
    )
    sys.exit(2)

FITTED_CLIPS = 64
"""Held-out clips on which the latents of two autoencoders are fitted to each other."""

DRAWN_AHEAD = 2048
"""ToyTable clips that a GPU draws at once."""

ENCODED = {"cpu": 16, "cuda": 512}
"""Clips of 25 frames of 64x64 pixels that are encoded at once; of larger ones as many fewer."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train the autoencoder, encode a data set, train models on it.",
)
Run = Annotated[
    Path, typer.Option("--output", "-o", help="Run directory; a run found there is resumed.")
]
Config = Annotated[str, typer.Option(help=f"Named configuration: {', '.join(RECIPES)}.")]
Data = Annotated[str, typer.Option(help=f"toytable, or a reader: {', '.join(READERS)}.")]
DataOfLatents = Annotated[
    str,
    typer.Option(
        help=f"toytable, or a reader: {', '.join(READERS)}; by default what the latents are of, or "
        "toytable."
    ),
]
Root = Annotated[Path | None, typer.Option(help="Where the data set lies.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a training option, name=value; repeat as needed."),
]
SetModel = Annotated[
    list[str] | None,
    typer.Option("--set-model", help="Override a model option, e.g. flow.modulation=additive."),
]
Until = Annotated[int | None, typer.Option(min=1, help="Stop after this step; resume later.")]
Device = Annotated[str, typer.Option(help="cuda, cpu; by default a GPU where there is one.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads of this process.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]
From = Annotated[
    Path, typer.Option(help="The trained autoencoder: a run, a checkpoint or a bundle.")
]
Init = Annotated[
    Path | None, typer.Option(help="Start from these weights: a run, checkpoint or bundle.")
]


@app.command()
def autoencoder(
    run: Run,
    config: Config = "toytable",
    data: Data = "toytable",
    root: Root = None,
    set_data: SetData = None,
    init: Init = None,
    set_: Set = None,
    set_model: SetModel = None,
    until: Until = None,
    device: Device = "",
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Stage 1: the video autoencoder."""
    chosen = _recipe(config, set_model)
    settings = override(chosen.autoencoder, set_)
    _threads(threads)
    if init is None:
        if settings.freeze_encoder and not find_checkpoints(run):
            raise ConfigError("freeze_encoder: which encoder? give --init; its decoder learns")
        network = build(chosen.model, settings.seed)
        open_skips(network.autoencoder)
    else:
        network = _with_autoencoder(chosen.model, load_weights(init)[0], settings.seed)
    given = DataSet.of(data, root, set_data)
    with process_group(device) as ranks, _naming(ranks, quiet) as on_skip:
        held_out = _source(
            chosen.model, given, ranks, frames=settings.frames, held_out=True, on_skip=on_skip
        )
        source = _source(
            chosen.model, given, ranks, frames=settings.frames, seed=settings.seed, on_skip=on_skip
        )
        stage = stages.AutoencoderStage(network, chosen.sampling, settings, held_out)
        described = {"data": given.described()}
        Trainer(stage, source, run, ranks=ranks, quiet=quiet, description=described).run(until)


@app.command()
def encode(
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the latents.")],
    autoencoder: From,
    clips: Annotated[int, typer.Option(min=1, help="How many clips to encode.")] = 20_000,
    frames: Annotated[int, typer.Option(min=1, help="Pixel frames of a clip.")] = 25,
    data: Data = "toytable",
    root: Root = None,
    set_data: SetData = None,
    seed: Annotated[int, typer.Option(help="Seed of the data.")] = 0,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Stop after so long, with what is whole by then.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Clips at once; by default by their size.")
    ] = None,
    device: Device = "",
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Run a data set through the autoencoder once, to train on its latents many times."""
    _threads(threads)
    model, _ = load_weights(autoencoder)
    given = DataSet.of(data, root, set_data)
    with (
        process_group(device) as ranks,
        _naming(ranks, quiet) as on_skip,
        progress_bar("encode", clips, quiet) as advance,
    ):
        if ranks.world > 1:
            raise InputError("encode is one process: start it without torchrun")
        model.to(ranks.device)
        ae = model.config.autoencoder
        fits = ENCODED[ranks.device.type] * 25 * 64 * 64 // (frames * ae.height * ae.width)
        write_latents(
            _source(model.config, given, ranks, frames=frames, seed=seed, on_skip=on_skip),
            lambda pixels: stages.encode_clips(model, pixels),
            output,
            clips=clips,
            temporal_compression=ae.temporal_compression,
            autoencoder=stages.weights_id(model.autoencoder),
            data=given.described(),
            seed=seed,
            batch=batch or min(max(fits, 1), ENCODED[ranks.device.type]),
            seconds=math.inf if minutes is None else 60 * minutes,
            progress=advance,
        )


@app.command()
def model(
    run: Run,
    autoencoder: From,
    config: Config = "toytable",
    data: DataOfLatents = "",
    root: Root = None,
    set_data: SetData = None,
    latents: Annotated[
        list[Path] | None,
        typer.Option(help="Train on latents that `encode` wrote; repeat for several directories."),
    ] = None,
    init: Init = None,
    set_: Set = None,
    set_model: SetModel = None,
    until: Until = None,
    device: Device = "",
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Stage 2: Temporal ViT, Canvas ViT, Spatial MAR and flow head, on latents."""
    chosen = _recipe(config, set_model)
    settings = override(chosen.training, set_)
    _threads(threads)
    trained, _ = load_weights(autoencoder)
    network = _with_autoencoder(chosen.model, trained, settings.seed)
    described: dict[str, Any] = {"autoencoder": stages.weights_id(trained.autoencoder)}
    source: ClipSource | None = None
    if latents:
        source = LatentSource(*latents, seed=settings.seed)
        _check_latents(source, latents[0], autoencoder, described["autoencoder"], settings.frames)
        given = DataSet.of_latents(source.about, data, root, set_data)
        described["data"] = source.about
    else:
        given = DataSet.of(data or "toytable", root, set_data)
    _check_told(given, chosen.model)
    with process_group(device) as ranks, _naming(ranks, quiet) as on_skip:
        held_out = _source(
            chosen.model, given, ranks, frames=settings.frames, held_out=True, on_skip=on_skip
        )
        if ranks.main and not quiet:
            _tell_window(chosen.model, settings.frames)
        if init is None:
            zero_outputs(network)
        else:
            before = load_weights(init, whole=True)[0]
            before = _translated(before, network, held_out, f"--init {init}")
            transfer(before, network, f"--init {init}")
        stage = stages.ModelStage(network, chosen.sampling, settings, held_out)
        if source is None:
            source = _source(
                chosen.model, given, ranks, frames=settings.frames, seed=settings.seed,
                on_skip=on_skip,
            )  # fmt: skip
            described["data"] = given.described()
        if network.config.action_dim and not source.action_dim and ranks.main and not quiet:
            where = "encode again with" if latents else "try"
            stderr.print(
                "the model takes actions and the data give none: it learns to do without; if there "
                f"are some, {where} --set-data action_dim=A, A numbers a frame",
                markup=False, highlight=False, soft_wrap=True,
            )  # fmt: skip
        Trainer(stage, source, run, ranks=ranks, quiet=quiet, description=described).run(until)


def _threads(count: int | None) -> None:
    if count is not None:
        torch.set_num_threads(count)


def _recipe(name: str, set_model: Sequence[str] | None) -> Recipe:
    chosen = recipe(name)
    return dataclasses.replace(chosen, model=override(chosen.model, set_model))


def _source(
    config: ModelConfig,
    data: DataSet,
    ranks: Ranks,
    *,
    frames: int,
    on_skip: Callable[[str, str], None],
    seed: int = 0,
    held_out: bool = False,
) -> ClipSource:
    ae = config.autoencoder
    check_length(frames, ae.temporal_compression)
    if data.name == "toytable":
        if data.root is not None or data.options:
            option = "--set-data" if data.root is None else "--root"
            raise InputError(
                f"{option} needs --data, one of {', '.join(READERS)}: toytable reads no directory"
            )
        if ae.height != ae.width:
            raise ConfigError(f"toytable is square, the model wants {ae.height}x{ae.width}")
        # held-out clips are few, and the same on every machine
        table = ToyTableSource(
            frames=frames,
            size=ae.height,
            seed=stages.HELD_OUT_SEED if held_out else seed * 1000,
            device="cpu" if held_out else str(ranks.device),
        )
        apart = ranks.world > 1  # every rank would draw the others' clips too
        return table if table.device == "cpu" or apart else AheadSource(table, DRAWN_AHEAD)
    return data.source(
        frames=frames,
        height=ae.height,
        width=ae.width,
        seed=seed,
        split="test" if held_out else "train",
        on_skip=on_skip,
    )


@contextmanager
def _naming(ranks: Ranks, quiet: bool) -> Iterator[Callable[[str, str], None]]:
    """What names recordings that are left out, each once; at the end it tells how many."""
    names: set[str] = set()

    def show(text: str) -> None:
        if ranks.main and not quiet:
            stderr.print(text, markup=False, highlight=False, soft_wrap=True)

    def skip(name: str, reason: str) -> None:
        if name not in names:
            names.add(name)
            show(f"left out {name}: {reason}")

    yield skip
    if names:
        show(f"recordings left out: {len(names)}")


def _check_told(data: DataSet, config: ModelConfig) -> None:
    """Actions that were asked for by name must have somewhere to go."""
    told = data.options.get("action_dim")
    if isinstance(told, int) and told and not config.action_dim:
        ae = config.autoencoder
        raise ConfigError(
            f"data with action_dim={told}: model {config.name} takes no actions; add --set-model "
            f"action_dim={told * ae.temporal_compression * config.group}, those of a step, or "
            "--set-data action_dim=0 to leave them out"
        )


def _tell_window(config: ModelConfig, frames: int) -> None:
    """Say where a longer rollout meets what the training never shows."""
    latent = 1 + (frames - 1) // config.autoencoder.temporal_compression
    if latent <= config.context_frames:
        stderr.print(
            f"clips of {frames} frames ({latent} latent frames) do not go beyond the window of "
            f"{config.context_frames}: what comes when the first frame leaves it, in longer "
            "rollouts, is not learnt; --set frames=N or a smaller --set-model context_frames=N "
            "shows it",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip


def _check_latents(
    source: LatentSource, latents: Path, autoencoder: Path, weights: str, frames: int
) -> None:
    if source.about["autoencoder"] != weights:
        raise InputError(
            f"{latents}: made by another autoencoder than {autoencoder}; run "
            "`python -m training encode` again"
        )
    if source.frames != frames:
        raise InputError(
            f"{latents}: clips of {source.frames} frames, this training wants {frames}; give --set "
            f"frames={source.frames}, or run `python -m training encode --frames {frames}` again"
        )


def _translated(
    given: FrameModel, network: FrameModel, held_out: ClipSource, where: str
) -> FrameModel:
    """`given`; where the encoders differ, on the grid of `network`, whose latents it then reads and
    writes.

    Raises:
        ConfigError: if a latent token of theirs does not stand for as many pixels and frames.
    """
    old, new = given.config.autoencoder, network.config.autoencoder
    encoders = [stages.weights_id(m.autoencoder.encoder) for m in (given, network)]
    if encoders[0] == encoders[1]:
        return given
    had, has = ((ae.temporal_compression, ae.spatial_compression) for ae in (old, new))
    if had != has:
        raise ConfigError(
            f"{where}: its latents stand for {had[0]} frames of {had[1]}x{had[1]} pixels, the "
            f"model's for {has[0]} of {has[1]}x{has[1]}; no map leads from those to these: start "
            "without --init"
        )
    if (old.height, old.width) != (new.height, new.width):
        size = dataclasses.replace(old, height=new.height, width=new.width)
        resized = build(dataclasses.replace(given.config, autoencoder=size))
        transfer(given, resized, where, autoencoder=True)
        given = resized
    told = held_out.clips(0, FITTED_CLIPS)
    assert isinstance(told, Clips)
    translate(given, *(stages.encode_clips(m, told.frames) for m in (given, network)))
    return given


def _with_autoencoder(config: ModelConfig, trained: FrameModel, seed: int) -> FrameModel:
    if trained.config.autoencoder != config.autoencoder:
        raise ConfigError(
            "the autoencoder was trained with another configuration: "
            f"{trained.config.autoencoder}, and this model wants {config.autoencoder}"
        )
    network = build(config, seed)
    network.autoencoder.load_state_dict(trained.autoencoder.state_dict())
    return network


if __name__ == "__main__":
    run_command(app)
