"""`python -m training`: from nothing to a checkpoint, stopped and resumed, and every mistake said
in one line."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from canvasmar_rt.command import run_command
from canvasmar_rt.models import sampler
from canvasmar_rt.models.canvasmar import CanvasMAR, FrameModel
from canvasmar_rt.models.checkpoint import load_checkpoint
from canvasmar_rt.models.families import build
from training.__main__ import app
from training.clips import LatentSource, ToyTableSource
from training.config import recipe
from training.losses import rotations
from training.stages import encode_clips, weights_id
from training.trainer import latest_checkpoint, load_weights
from training.transfer import READERS, WRITERS

SIZES = (
    "autoencoder.height=16", "autoencoder.width=16", "autoencoder.widths=[8,16]",
    "autoencoder.blocks=1", "flow.width=32", "flow.blocks=1", "dim=32", "heads=2",
    "temporal_layers=1", "canvas_layers=1", "spatial_layers=2", "encoder_layers=1",
)  # fmt: skip
MODEL = [word for size in SIZES for word in ("--set-model", size)]
SHORT = [
    word
    for option in (
        "batch=2", "frames=5", "steps=3", "warmup_steps=0", "decay_steps=0", "checkpoint_every=1",
        "sample_every=0", "log_every=1",
    )
    for word in ("--set", option)
]  # fmt: skip
AUTOENCODER = ["autoencoder", *MODEL, *SHORT, "--set", "statistics_clips=2", "--quiet"]
TRAIN = ["model", *MODEL, *SHORT, "--quiet", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Signal handlers as they were."""
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(*arguments: Any) -> str:
    """Run a command to its end: what it printed on stderr."""
    done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stderr


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("autoencoder") / "run"
    run(*AUTOENCODER, "-o", directory, "--device", "cpu", "--threads", 1)
    return directory


@pytest.fixture(scope="module")
def latents(autoencoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("latents")
    run("encode", "-o", directory, "--autoencoder", autoencoder, "--clips", 6, "--frames", 5,
        "--quiet")  # fmt: skip
    return directory


@pytest.fixture
def fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run a command as the shell does: it must exit with a status and one line, which is given."""

    def run_and_fail(*arguments: Any, code: int = 2) -> str:
        monkeypatch.setattr(sys, "argv", ["training", *map(str, arguments)])
        with pytest.raises(SystemExit) as leaving:
            run_command(app)
        assert leaving.value.code == code
        errors = capsys.readouterr().err
        assert "Traceback" not in errors
        lines = errors.strip().splitlines()
        assert len(lines) == 1, lines
        return lines[0]

    return run_and_fail


def states(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.glob("*step_*"))


# The whole way


def test_stage_one_leaves_a_scaled_autoencoder(autoencoder: Path) -> None:
    assert states(autoencoder) == ["step_00000002", "step_00000003"]
    described = json.loads((autoencoder / "run.json").read_text())
    assert described["data"] == {"name": "toytable"}
    assert described["model"]["autoencoder"]["widths"] == [8, 16]
    assert described["training"]["statistics_clips"] == 2
    ae = load_weights(autoencoder)[0].autoencoder
    assert (ae.latent_std != 1).all()
    log = (autoencoder / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2, 3]


@pytest.mark.parametrize("stored", [False, True], ids=["encoded-on-the-way", "stored-latents"])
def test_stage_two_makes_a_model_that_predicts(
    stored: bool, autoencoder: Path, latents: Path, tmp_path: Path
) -> None:
    data = ["--latents", latents] if stored else []
    run(*TRAIN, "-o", tmp_path, "--autoencoder", autoencoder, *data)
    assert states(tmp_path) == ["step_00000002", "step_00000003"]
    model, sampling = load_checkpoint(latest_checkpoint(tmp_path))
    trained = load_weights(autoencoder)[0]
    assert weights_id(model.autoencoder) == weights_id(trained.autoencoder)
    described = json.loads((tmp_path / "run.json").read_text())
    assert described["autoencoder"] == weights_id(trained.autoencoder)
    assert described["data"]["clips" if stored else "name"] == (6 if stored else "toytable")
    clips = ToyTableSource(frames=3, size=16).clips(0, 1)
    state = sampler.start(model, sampler.encode(model, clips.frames))
    noise = sampler.draw_noise(model.config, sampling, seed=0, streams=[0], frame=2)
    _, sample = sampler.step(model, sampling, state, noise)
    assert sample.frames.shape == (1, 2, 16, 16, 3)


def test_the_same_command_resumes(autoencoder: Path, tmp_path: Path) -> None:
    command = [*TRAIN, "--autoencoder", autoencoder]
    run(*command, "-o", tmp_path / "straight")
    run(*command, "-o", tmp_path / "parts", "--until", 1)
    assert states(tmp_path / "parts") == ["step_00000001"]
    run(*command, "-o", tmp_path / "parts")
    straight, parts = (
        load_file(tmp_path / d / "step_00000003" / "training.safetensors")
        for d in ("straight", "parts")
    )
    assert straight.keys() == parts.keys()
    for name, tensor in straight.items():
        assert torch.equal(parts[name], tensor), name


def test_an_autoencoder_can_start_from_another(autoencoder: Path, tmp_path: Path) -> None:
    run(*AUTOENCODER, "-o", tmp_path, "--init", autoencoder, "--until", 1,
        "--set", "learning_rate=1e-12", "--set", "frames=9")  # fmt: skip
    given = load_weights(autoencoder)[0].autoencoder.state_dict()
    for name, tensor in load_file(tmp_path / "step_00000001" / "training.safetensors").items():
        if name.startswith("weights."):
            torch.testing.assert_close(tensor, given[name.removeprefix("weights.autoencoder.")])


def test_a_frozen_encoder_leaves_the_latents_as_they_are(autoencoder: Path, tmp_path: Path) -> None:
    run(*AUTOENCODER, "-o", tmp_path, "--init", autoencoder, "--set", "freeze_encoder=true")
    before, after = (load_weights(d)[0].autoencoder.state_dict() for d in (autoencoder, tmp_path))
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) != name.startswith("decoder."), name


def test_a_frozen_encoder_keeps_its_scale_where_the_run_is_resumed(
    autoencoder: Path, fails: Callable[..., str], tmp_path: Path
) -> None:
    command = [*AUTOENCODER, "-o", tmp_path / "run", "--set", "freeze_encoder=true"]
    assert "which encoder? give --init" in fails(*command)
    run(*command, "--init", autoencoder, "--until", 2)
    run(*command)
    before, after = (load_weights(d)[0].autoencoder for d in (autoencoder, tmp_path / "run"))
    assert not torch.equal(before.latent_std, torch.ones_like(before.latent_std))
    for name in ("latent_mean", "latent_std"):
        assert torch.equal(getattr(after, name), getattr(before, name)), name


def test_a_model_can_start_from_another(autoencoder: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run(*TRAIN, "-o", first, "--autoencoder", autoencoder)
    run(*TRAIN, "-o", second, "--autoencoder", autoencoder, "--init", first, "--until", 1,
        "--set", "learning_rate=1e-12")  # fmt: skip
    given = load_checkpoint(latest_checkpoint(first))[0].state_dict()
    for name, tensor in load_file(second / "step_00000001" / "training.safetensors").items():
        if name.startswith("weights."):
            torch.testing.assert_close(tensor, given[name.removeprefix("weights.")])


def test_a_model_can_start_from_one_of_other_latents(autoencoder: Path, tmp_path: Path) -> None:
    """Only what reads and writes latents is fitted to those of the other autoencoder."""
    first, other, second = tmp_path / "first", tmp_path / "other", tmp_path / "second"
    run(*TRAIN, "-o", first, "--autoencoder", autoencoder)
    wider = ["--set-model", "autoencoder.latent_channels=24"]
    run(*AUTOENCODER, *wider, "-o", other, "--until", 1)
    run(*TRAIN, *wider, "-o", second, "--autoencoder", other, "--init", first, "--until", 1,
        "--set", "learning_rate=1e-12")  # fmt: skip
    given, learnt = (load_checkpoint(latest_checkpoint(d))[0].state_dict() for d in (first, second))
    fitted = {n for n in learnt if given[n].shape != learnt[n].shape}
    fitted = {n.rsplit(".", 1)[0] for n in fitted if not n.startswith("autoencoder.")}
    assert fitted == {*READERS, *WRITERS}
    for name, tensor in learnt.items():
        if not name.startswith(("autoencoder.", *WRITERS)) and given[name].shape == tensor.shape:
            torch.testing.assert_close(tensor, given[name], msg=name)


def test_latents_of_another_picture_size_are_fitted_too(autoencoder: Path, tmp_path: Path) -> None:
    first, other, second = tmp_path / "first", tmp_path / "other", tmp_path / "second"
    run(*TRAIN, "-o", first, "--autoencoder", autoencoder)
    size = ["--set-model", "autoencoder.height=32", "--set-model", "autoencoder.width=32"]
    run(*AUTOENCODER, *size, "-o", other, "--set", "seed=1")
    run(*TRAIN, *size, "-o", second, "--autoencoder", other, "--init", first, "--until", 1,
        "--set", "learning_rate=1e-12")  # fmt: skip
    (given, _), (learnt, _) = (load_weights(d) for d in (first, second))
    pixels = ToyTableSource(frames=5, size=32, seed=1).clips(0, 64).frames
    resized = build(dataclasses.replace(given.config, autoencoder=learnt.config.autoencoder))
    resized.autoencoder.load_state_dict(given.autoencoder.state_dict())
    old, new = (encode_clips(m, pixels).flatten(0, 2).double() for m in (resized, learnt))
    read = torch.linalg.lstsq(new, old).solution.T.float()
    torch.testing.assert_close(
        learnt.flow.embed.weight, given.flow.embed.weight @ read, atol=1e-4, rtol=1e-3
    )


def test_latents_of_other_pieces_of_video_have_no_map(
    autoencoder: Path, fails: Callable[..., str], tmp_path: Path
) -> None:
    first, other = tmp_path / "first", tmp_path / "other"
    run(*TRAIN, "-o", first, "--autoencoder", autoencoder)
    finer = ["--set-model", "autoencoder.widths=[8]"]
    run(*AUTOENCODER, *finer, "-o", other, "--until", 1)
    line = fails(*TRAIN, *finer, "-o", tmp_path / "second", "--autoencoder", other, "--init", first)
    assert "2 frames of 8x8 pixels, the model's for 2 of 4x4" in line


def test_a_model_can_start_from_one_of_a_coarser_temporal_patch(
    autoencoder: Path, tmp_path: Path
) -> None:
    """Four tokens alike are read, and begin a video, as the one patch that they were."""
    first, second = tmp_path / "first", tmp_path / "second"
    run(*TRAIN, "-o", first, "--autoencoder", autoencoder)
    run(*TRAIN, "-o", second, "--autoencoder", autoencoder, "--init", first, "--until", 1,
        "--set", "learning_rate=1e-12", "--set-model", "temporal_patch=1")  # fmt: skip
    coarse, fine = (load_checkpoint(latest_checkpoint(d))[0].temporal for d in (first, second))
    token = torch.randn(3, coarse.embed.in_features // 4)
    torch.testing.assert_close(fine.embed(token), coarse.embed(token.repeat(1, 4)))
    assert fine.bos.shape == (4 * len(coarse.bos), coarse.bos.shape[1])
    torch.testing.assert_close(fine.bos.mean(0), coarse.bos.mean(0), atol=0.1, rtol=0)


def test_a_model_can_start_from_a_narrower_and_shallower_one(
    autoencoder: Path, tmp_path: Path
) -> None:
    """What is added computes nothing at first."""
    first, second = tmp_path / "first", tmp_path / "second"
    run(*TRAIN, "-o", first, "--autoencoder", autoencoder)
    wider = ["dim=64", "heads=4", "temporal_layers=2", "canvas_layers=3", "spatial_layers=4"]
    changed = [word for size in wider for word in ("--set-model", size)]
    run(*TRAIN, *changed, "-o", second, "--autoencoder", autoencoder, "--init", first,
        "--until", 1, "--set", "learning_rate=1e-12")  # fmt: skip
    given, grown = (load_checkpoint(latest_checkpoint(d))[0] for d in (first, second))
    assert (grown.config.dim, grown.config.spatial_layers) == (64, 4)
    ae, generator = given.config.autoencoder, torch.Generator().manual_seed(0)
    latents = torch.randn(2, 3, given.config.tokens, ae.latent_channels, generator=generator)
    told = latents, torch.randn(2, 3, given.config.action_dim, generator=generator)
    with torch.no_grad():
        seen = [computed(model, *told) for model in (given, grown)]
    for old, new in zip(*seen, strict=True):
        torch.testing.assert_close(new[..., : old.shape[-1]], old, atol=5e-3, rtol=0)
        assert not new[..., old.shape[-1] :].abs().gt(5e-3).any()


def computed(model: FrameModel, latents: Tensor, actions: Tensor) -> tuple[Tensor, ...]:
    """What every network makes of clips (2, 3, N, C) and their actions."""
    assert isinstance(model, CanvasMAR)
    assert model.canvas is not None
    on, flow = torch.ones(2, 3), model.flow
    is_first = torch.zeros_like(on).index_fill(1, torch.tensor(0), 1.0)
    times = rotations(model.config, range(3), torch.device("cpu"))
    z = model.temporal(latents, is_first, actions, on, times).flatten(0, 1)
    tokens = latents.flatten(0, 1)
    z_canvas, canvas, staticness = model.canvas(z, tokens, tokens)
    every = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
    z_set = model.spatial(z, z_canvas, every[:, :3], 3, tokens[:, 3:], every[:, 3:])
    time = flow.embed_time(torch.tensor([0.3]))
    velocity = flow.velocity(tokens[:, :3], time, flow.embed_condition(z_set))
    return z, z_canvas, canvas, staticness, z_set, velocity


def test_a_model_cannot_start_from_a_wider_one(
    autoencoder: Path, fails: Callable[..., str], tmp_path: Path
) -> None:
    first = tmp_path / "first"
    run(*TRAIN, "--set-model", "spatial_layers=3", "-o", first, "--autoencoder", autoencoder,
        "--until", 1)  # fmt: skip
    for other, reason in (
        (["dim=16", "heads=1"], "does not fit"),
        (["dim=64", "heads=2"], "its head_dim is 16, not 32"),
        ([], "there is no place for its spatial.blocks.2."),
    ):
        changed = [w for s in other for w in ("--set-model", s)]
        assert reason in fails(*TRAIN, *changed, "-o", tmp_path / "second", "--autoencoder",
                               autoencoder, "--init", first)  # fmt: skip


def test_progress_is_shown_unless_quiet(autoencoder: Path, tmp_path: Path) -> None:
    command = [*TRAIN, "-o", tmp_path, "--autoencoder", autoencoder]
    assert run(*command, "--until", 1) == ""
    window, *lines = run(*[word for word in command if word != "--quiet"]).splitlines()
    assert "do not go beyond the window" in window
    assert [line.split()[:2] for line in lines] == [["model", "2/3"], ["model", "3/3"]]


# Options


def test_options_reach_the_configuration(tmp_path: Path) -> None:
    run(*AUTOENCODER, "-o", tmp_path, "--until", 1, "--set", "precision=fp32",
        "--set", "betas=[0.5, 0.75]", "--set", "learning_rate=1e-3",
        "--set-model", "flow.modulation=additive", "--set-model", "canvas=false",
        "--set-model", "autoencoder.temporal_kernel=2", "--set-model", "name=mine")  # fmt: skip
    described = json.loads((tmp_path / "run.json").read_text())
    assert described["training"]["precision"] == "fp32"
    assert described["training"]["betas"] == [0.5, 0.75]
    assert described["training"]["learning_rate"] == 1e-3
    assert described["model"]["flow"]["modulation"] == "additive"
    assert described["model"]["canvas"] is False
    assert described["model"]["autoencoder"]["temporal_kernel"] == 2
    assert load_weights(tmp_path)[0].config.name == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "lerning_rate=1"], r"no option 'lerning_rate'; there are .*learning_rate"),
        (["--set", "steps"], "'steps': expected name=value"),
        (["--set", "steps=many"], "steps: expected int, got 'many'"),
        (["--set", "steps=0"], "steps must be at least 1"),
        (["--set", "learning_rate=NaN"], "learning_rate must be above 0"),
        (["--set", "seed=-1"], r"seed must lie in \[0, 2\*\*63\)"),
        (["--set", "betas=[0.9,1]"], r"betas must lie in \[0, 1\)"),
        (["--set", "betas=[0.9]"], "betas: expected 2 entries"),
        (["--set", "optimizer=sgd"], r"\('adamw', 'muon'\)"),
        (["--set", "kl_weight=-1"], "kl_weight"),
        (["--set", "frames=4"], r"clips of 4 frames: the model wants 1 \+ n\*2"),
        (["--set-model", "flow.witdh=3"], r"no option 'flow.witdh'; there are blocks, .*width"),
        (["--set-model", "flow.width.x=3"], "no option 'flow.width.x'"),
        (["--set-model", "nothing.x=3"], "no option 'nothing.x'; there are name"),
        (["--set-model", "flow=3"], "expected an object"),
        (["--set-model", "dim=33"], "multiple of heads"),
        (["--set-model", "autoencoder.height=32"], "toytable is square"),
        (["--config", "bear"], "bair, ucf101, kinetics600, toytable"),
        (["--data", "bair-frames"], "needs --root"),
        (["--data", "bair"], "no data set reader is called"),
        (["--root", "."], "--root needs --data, one of bair-tfrecord, .*videos"),
        (["--data", "nothing", "--root", "."], "bair"),
        (["--device", "gpu"], "device 'gpu'"),
        pytest.param(
            ["--device", "cuda"],
            "no CUDA GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU"),
        ),
    ],
    ids=lambda a: " ".join(a) if isinstance(a, list) else "",
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, fails: Callable[..., str], tmp_path: Path
) -> None:
    line = fails(*AUTOENCODER, "-o", tmp_path / "run", *arguments)
    assert line.startswith("error: ")
    assert re.search(message, line), line
    assert not (tmp_path / "run").exists()


def test_mistakes_between_stages_are_one_line(
    autoencoder: Path, latents: Path, fails: Callable[..., str], tmp_path: Path
) -> None:
    out = ["-o", tmp_path / "run"]
    assert "nowhere" in fails(*TRAIN, *out, "--autoencoder", tmp_path / "nowhere")
    assert "neither a checkpoint nor" in fails(*TRAIN, *out, "--autoencoder", latents)
    line = fails(*TRAIN, *out, "--autoencoder", autoencoder, "--set-model", "autoencoder.patch=2")
    assert "trained with another configuration" in line
    line = fails(*TRAIN, *out, "--autoencoder", autoencoder, "--latents", tmp_path)
    assert "no whole set of latents" in line
    line = fails(*TRAIN, *out, "--autoencoder", autoencoder, "--set", "frames=3")
    assert "at least 5" in line
    line = fails("encode", *out, "--autoencoder", autoencoder, "--frames", 4)
    assert "1 + n*2" in line
    assert not (tmp_path / "run").exists()


def test_latents_of_another_autoencoder_are_refused(
    autoencoder: Path, latents: Path, fails: Callable[..., str], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    run(*AUTOENCODER, "-o", other, "--until", 1, "--set", "seed=1")
    line = fails(*TRAIN, "-o", tmp_path / "run", "--autoencoder", other, "--latents", latents)
    assert "made by another autoencoder" in line
    # nor does a run go on with another one
    run(*TRAIN, "-o", tmp_path / "run", "--autoencoder", autoencoder, "--until", 1)
    line = fails(*TRAIN, "-o", tmp_path / "run", "--autoencoder", other)
    assert "another autoencoder" in line


def test_a_run_is_not_taken_up_with_other_options(
    autoencoder: Path, fails: Callable[..., str]
) -> None:
    line = fails(*AUTOENCODER, "-o", autoencoder, "--set", "learning_rate=5e-3")
    assert "another learning_rate; choose another directory" in line
    line = fails(*TRAIN, "-o", autoencoder, "--autoencoder", autoencoder)
    assert "another stage" in line
    (autoencoder.parent / "file").write_text("")
    line = fails(*AUTOENCODER, "-o", autoencoder.parent / "file" / "run")
    assert "cannot be written" in line


@pytest.mark.parametrize("command", ["autoencoder", "encode", "model"])
def test_no_threads_are_too_few(command: str, tmp_path: Path) -> None:
    words = [command, "-o", str(tmp_path / "run"), "--threads", "0"]
    if command != "autoencoder":
        words += ["--autoencoder", "toytable"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 2
    assert "'--threads'" in done.stderr


def test_latents_are_as_long_as_the_clips_of_the_training(
    autoencoder: Path, latents: Path, fails: Callable[..., str], tmp_path: Path
) -> None:
    command = [*TRAIN, "-o", tmp_path / "run", "--autoencoder", autoencoder, "--latents", latents]
    line = fails(*command, "--set", "frames=9")
    assert "clips of 5 frames, this training wants 9; give --set frames=5, or run" in line
    assert "encode --frames 9" in line
    assert not (tmp_path / "run").exists()


def test_encoded_clips_are_as_long_as_the_toytable_model_takes(
    autoencoder: Path, tmp_path: Path
) -> None:
    run("encode", "-o", tmp_path, "--autoencoder", autoencoder, "--clips", 2, "--quiet")
    assert LatentSource(tmp_path).frames == recipe("toytable").training.frames == 25


def test_only_a_model_is_one_to_start_a_model_from(
    autoencoder: Path, fails: Callable[..., str], tmp_path: Path
) -> None:
    line = fails(*TRAIN, "-o", tmp_path, "--autoencoder", autoencoder, "--init", autoencoder)
    assert "only the autoencoder was trained" in line


# Recordings


def recordings(folder: Path, good: int, broken: int) -> None:
    folder.mkdir(parents=True)
    for i in range(good):
        shade = np.arange(7 * 16 * 16 * 3).reshape(7, 16, 16, 3) * (i + 1)
        np.savez(folder / f"{i}.npz", frames=shade.astype(np.uint8))
    for i in range(broken):
        (folder / f"broken_{i}.npz").write_bytes(b"PK half of it")


def test_held_out_clips_come_from_what_the_latents_are_of(
    autoencoder: Path, fails: Callable[..., str], tmp_path: Path
) -> None:
    data, latents = tmp_path / "data", tmp_path / "latents"
    recordings(data / "train", 2, 0)
    run("encode", "-o", latents, "--autoencoder", autoencoder, "--clips", 2, "--frames", 5,
        "--data", "videos", "--root", data, "--quiet")  # fmt: skip
    about = LatentSource(latents).about
    assert (about["name"], about["root"]) == ("videos", str(data))
    command = [*TRAIN, "--set", "sample_every=1", "--until", 1, "-o", tmp_path / "run",
               "--autoencoder", autoencoder, "--latents", latents]  # fmt: skip
    assert f"{data / 'test'}: no such folder" in fails(*command)
    assert "moved: no such folder" in fails(*command, "--root", tmp_path / "moved")
    recordings(data / "test", 4, 0)
    run(*command)
    assert list((tmp_path / "run" / "samples").iterdir())


def test_latents_that_do_not_name_their_data_are_toytable_s(
    autoencoder: Path, latents: Path, tmp_path: Path
) -> None:
    older = tmp_path / "older"
    older.mkdir()
    for file in latents.iterdir():
        (older / file.name).write_bytes(file.read_bytes())
    about = json.loads((latents / "latents.json").read_text())
    assert about.pop("name") == "toytable"
    (older / "latents.json").write_text(json.dumps(about))
    for directory in (older, latents):  # the same, once encoded again
        run(*TRAIN, "-o", tmp_path / "run", "--autoencoder", autoencoder, "--latents", directory)


def robot(folder: Path, count: int) -> None:
    """Recordings of seven frames with three numbers of action between two, as a lab keeps them."""
    recordings(folder, count, 0)
    for i in range(count):
        rows = np.full((6, 3), i / 8)
        np.savetxt(folder / f"{i}.actions.csv", rows, delimiter=",")
        with np.load(folder / f"{i}.npz") as archive:
            np.save(folder / f"{i}.npy", archive["frames"])
        (folder / f"{i}.npz").unlink()


def test_own_recordings_with_actions_from_the_first_stage_to_the_last(
    autoencoder: Path, fails: Callable[..., str], tmp_path: Path
) -> None:
    robot(tmp_path / "data" / "train", 4)
    robot(tmp_path / "data" / "test", 4)
    data = ["--data", "videos", "--root", tmp_path / "data", "--set-data", "action_dim=3"]
    latents = tmp_path / "latents"
    run("encode", "-o", latents, "--autoencoder", autoencoder, "--clips", 3, "--frames", 5,
        *data, "--set-data", "workers=2", "--quiet")  # fmt: skip
    source = LatentSource(latents)
    assert source.action_dim == 3
    assert source.about["options"] == {"action_dim": 3}
    actions = source.clips(0, 3).actions
    assert actions is not None
    assert actions.shape == (3, 2, 6)
    assert {float(row[0, 0]) for row in actions} <= {0.0, 0.125, 0.25, 0.375}
    command = [*TRAIN, "--set-model", "action_dim=6", "--set", "sample_every=1", "--until", 1,
               "--autoencoder", autoencoder]  # fmt: skip
    run(*command, "-o", tmp_path / "on-latents", "--latents", latents)
    run(*command, "-o", tmp_path / "run", *data)
    blind = [
        *command,
        "--set-model",
        "action_dim=0",
        "-o",
        tmp_path / "blind",
        "--latents",
        latents,
    ]
    line = fails(*blind)  # nobody gave --set-data
    assert "data with action_dim=3: model toytable takes no actions" in line
    assert "or --set-data action_dim=0 to leave them out" in line
    run(*blind, "--set-data", "action_dim=0")
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    root = str(tmp_path / "data")
    assert described["data"] == {"name": "videos", "root": root, "options": {"action_dim": 3}}
    assert load_weights(tmp_path / "run")[0].config.action_dim == 6
    line = fails(*command, "-o", tmp_path / "run", *data, "--set-data", "action_dim=2")
    assert "actions of 2 numbers a frame make 4 a step, the model's action_dim is 6" in line
    line = fails(*command, "-o", tmp_path / "run", *data, "--set-data", "action_dim=0")
    assert "another data" in line


def test_a_model_that_takes_actions_says_that_it_gets_none(
    autoencoder: Path, tmp_path: Path
) -> None:
    recordings(tmp_path / "data" / "train", 2, 0)
    recordings(tmp_path / "data" / "test", 4, 0)
    command = [word for word in TRAIN if word != "--quiet"]
    command += ["--autoencoder", autoencoder, "--until", 1]
    data = ["--data", "videos", "--root", tmp_path / "data"]
    assert "the data give none" in run(*command, "-o", tmp_path / "a", *data)
    told = run(*command, "-o", tmp_path / "b", *data, "--set-model", "action_dim=0")
    assert "the data give none" not in told
    assert "the data give none" not in run(*command, "-o", tmp_path / "c")


def test_actions_asked_for_by_name_must_have_somewhere_to_go(
    autoencoder: Path, fails: Callable[..., str], tmp_path: Path
) -> None:
    robot(tmp_path / "data" / "train", 1)
    data = ["--data", "videos", "--root", tmp_path / "data", "--set-data", "action_dim=3"]
    command = [*TRAIN, "--autoencoder", autoencoder, "--set-model", "action_dim=0"]
    line = fails(*command, "-o", tmp_path / "run", *data)
    assert "takes no actions; add --set-model action_dim=6, those of a step" in line


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["colour=1"], "--set-data colour: videos takes action_dim, stride, workers"),
        (["frames=3"], "--set-data frames: is decided by the command itself"),
        (["name=x"], "--set-data name: is decided by the command itself"),
        (["workers=true"], "workers must be a whole number, got True"),
        (["stride=two"], "stride must be a whole number, got 'two'"),
        (["workers=1.5"], "workers must be a whole number, got 1.5"),
        (["stride"], "'stride': expected name=value"),
        (["action_dim=3", "stride=2"], "stride must be 1 for data with actions"),
    ],
)
def test_options_of_a_reader_that_do_not_go_are_one_line(
    words: list[str], reason: str, fails: Callable[..., str], tmp_path: Path
) -> None:
    recordings(tmp_path / "data" / "train", 1, 0)
    recordings(tmp_path / "data" / "test", 1, 0)
    options = [part for word in words for part in ("--set-data", word)]
    data = ["--data", "videos", "--root", tmp_path / "data"]
    assert reason in fails(*AUTOENCODER, "-o", tmp_path / "run", *data, *options)
    assert not (tmp_path / "run").exists()


def test_toytable_is_no_reader_with_options(fails: Callable[..., str], tmp_path: Path) -> None:
    line = fails(*AUTOENCODER, "-o", tmp_path / "run", "--set-data", "stride=2")
    assert "--set-data needs --data, one of bair-tfrecord" in line


def test_recordings_left_out_are_named_once_and_counted(tmp_path: Path) -> None:
    recordings(tmp_path / "data" / "train", 1, 2)
    recordings(tmp_path / "data" / "test", 1, 0)
    command = [*AUTOENCODER, "--data", "videos", "--root", tmp_path / "data"]
    assert run(*command, "-o", tmp_path / "quiet") == ""
    loud = [word for word in command if word != "--quiet"]
    lines = run(*loud, "-o", tmp_path / "run").splitlines()
    named = sorted(line for line in lines if line.startswith("left out "))
    assert len(named) == 2
    for i, line in enumerate(named):
        path = tmp_path / "data" / "train" / f"broken_{i}.npz"
        assert re.fullmatch(rf"left out {re.escape(str(path))}: .+", line)
    assert lines[-1] == "recordings left out: 2"


# Interrupts


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("when", ["step", "save"])
@pytest.mark.parametrize("times", [1, 2])
def test_an_interrupt_leaves_whole_checkpoints(
    how: signal.Signals, when: str, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second save, or the step before it, is interrupted, and finished first; a second signal
    is heeded at once. Then the run goes on."""
    calls = 0

    def interrupted(work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            done = work(*arguments, **options)
            if calls == 2:
                for _ in range(times):
                    os.kill(os.getpid(), how)
            return done

        return call

    with monkeypatch.context() as patch:
        patch.setattr("canvasmar_rt.signals.AT_ONCE", -1.0)
        patch.setattr(sys, "argv", ["training", *AUTOENCODER, "-o", str(tmp_path / "run")])
        if when == "save":
            patch.setattr("training.trainer.save_file", interrupted(save_file))
        else:
            make = torch.nn.utils.clip_grad_norm_
            patch.setattr("torch.nn.utils.clip_grad_norm_", interrupted(make))
        with pytest.raises(SystemExit) as leaving:
            run_command(app)
    assert leaving.value.code == 130
    assert calls == 2
    made = ["step_00000001", "step_00000002"]
    assert states(tmp_path / "run") == made[: 3 - times]
    load_weights(tmp_path / "run")
    run(*AUTOENCODER, "-o", tmp_path / "run")
    assert states(tmp_path / "run") == ["step_00000002", "step_00000003"]


def test_held_out_recordings_that_cannot_be_read_are_told_first(
    fails: Callable[..., str], tmp_path: Path
) -> None:
    robot(tmp_path / "data" / "train", 2)
    recordings(tmp_path / "data" / "test", 1, 0)
    data = ["--data", "videos", "--root", tmp_path / "data", "--set-data", "action_dim=3"]
    line = fails(*AUTOENCODER, "-o", tmp_path / "run", *data)
    assert "none of the 1 recordings can be used" in line
    assert not (tmp_path / "run").exists()
