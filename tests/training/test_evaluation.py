"""Evaluation: numbers that behave, frames that are compared with their own truth, and files."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from canvasmar_rt.bundle import BatchRange, Bundle
from canvasmar_rt.command import run_command
from canvasmar_rt.config import FlowConfig, ModelConfig, SamplingConfig, preset
from canvasmar_rt.engines import create
from canvasmar_rt.engines.torch_engine import load_model
from canvasmar_rt.errors import ConfigError, InputError
from canvasmar_rt.models.canvasmar import CanvasMAR
from canvasmar_rt.models.checkpoint import (
    PROGRESS_FILE,
    RUN_FILE,
    load_checkpoint,
    save_checkpoint,
)
from canvasmar_rt.models.families import build
from canvasmar_rt.rollout import Predictor
from tests.training.small_runs import Waves
from tests.training.test_metrics import Distance, StandIn, save_scripted
from training import evaluation, measures, protocols, stages
from training.clips import Clips, ToyTableSource
from training.config import ModelTraining
from training.datasets import RecordedClips, make_source
from training.evaluation import app
from training.measures import (
    ABLATIONS,
    AlikeDraws,
    held_out,
    measure_ablations,
    measure_losses,
    measure_one_step,
    measure_recall,
    measure_recordings,
    measure_rollouts,
    still_patches,
)
from training.metrics import BAIR, BAIR_DEBIASED, KINETICS600, PROTOCOLS, Protocol, at_resolution
from training.options import override
from training.protocols import context_frames, measure_protocol, predict_frames
from training.stages import Continuation

SAMPLING = SamplingConfig(ar_steps=2, flow_steps=2)


def tiny(**changes: Any) -> ModelConfig:
    """ToyTable's configuration in the smallest size: 64x64 pixels, 8x8 tokens, t = 2."""
    config, _ = preset("toytable")
    ae = dataclasses.replace(config.autoencoder, widths=(8, 16), latent_channels=4, blocks=1)
    small: dict[str, Any] = {
        "autoencoder": ae, "flow": FlowConfig(width=32, blocks=1), "dim": 32, "heads": 1,
        "temporal_layers": 1, "canvas_layers": 1, "spatial_layers": 2, "encoder_layers": 1,
        "context_frames": 4,
    }  # fmt: skip
    return dataclasses.replace(config, **small | changes)


def no_tick(done: int) -> None:
    pass


@pytest.fixture(scope="module")
def model() -> CanvasMAR:
    return build(tiny(), seed=0).eval()


@pytest.fixture(scope="module")
def plain() -> CanvasMAR:
    return build(tiny(canvas=False), seed=0).eval()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, model: CanvasMAR, plain: CanvasMAR) -> Path:
    """Checkpoints: `model`, `plain` without a canvas, `still` without actions, `small` of 32x32."""
    root = tmp_path_factory.mktemp("runs")
    ae = dataclasses.replace(tiny().autoencoder, height=32, width=32)
    made = {
        "model": model,
        "plain": plain,
        "still": build(tiny(action_dim=0), seed=0),
        "small": build(tiny(autoencoder=ae), seed=0),
    }
    for name, network in made.items():
        save_checkpoint(root / name, network, SAMPLING)
    return root


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Runs a command line in this process: exit status, stdout, stderr."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evaluation", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            run_command(app)
        out, err = capsys.readouterr()
        assert isinstance(left.value.code, int)
        return left.value.code, out, err

    yield run
    signal.signal(signal.SIGTERM, before)


Run = Callable[..., tuple[int, str, str]]


def measured(run: Run, output: Path, *arguments: object) -> dict[str, Any]:
    """The report of a command that succeeds; it is printed too, and nothing lies beside it."""
    code, out, err = run(*arguments, "-o", output)
    assert (code, err) == (0, "")
    assert [p.name for p in output.parent.iterdir()] == [output.name]
    report: dict[str, Any] = json.loads(output.read_text())
    assert json.loads(out) == report["result"]
    assert len(report["weights"]) == 16
    assert report["device"] == "cpu"
    return report


def refused(run: Run, output: Path, *arguments: object) -> str:
    """The one line of a command that fails for its user's mistake; it leaves no file."""
    code, out, err = run(*arguments, "-o", output)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not output.is_file()
    return err


Predict = Callable[[Tensor, int], Tensor]
"""(true clips uint8 (B, T, H, W, 3), frames given) -> predicted clips of that shape."""


def predicting(predict: Predict) -> Callable[..., Continuation]:
    """A stand-in for `continue_clips`."""

    def continued(
        model: CanvasMAR, sampling: SamplingConfig, clips: Clips, *, context: int, **_: Any
    ) -> Continuation:
        given = 1 + (context - 1) * model.config.autoencoder.temporal_compression
        return Continuation(frames=predict(clips.frames, given), canvas=clips.frames[:, -2:])

    return continued


def perfect(frames: Tensor, given: int) -> Tensor:
    return frames


def copied(frames: Tensor, given: int) -> Tensor:
    """The last frame given, again and again."""
    last = frames[:, given - 1 : given].expand_as(frames[:, given:])
    return torch.cat([frames[:, :given], last], dim=1)


def late(frames: Tensor, given: int) -> Tensor:
    """The truth, one frame late."""
    return torch.cat([frames[:, :given], frames[:, given - 1 : -1]], dim=1)


# Every command


def test_reconstruction(command: Run, runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out.json"
    report = measured(command, out, "reconstruction", runs / "model", "--clips", 3, "--frames", 5,
                      "--batch", 2)  # fmt: skip
    model, _ = load_checkpoint(runs / "model")
    clips = held_out(0, 3, 5, 64).frames
    error = stages.reconstruct(model, clips).numpy().astype(float) - clips.numpy()
    each = 10 * np.log10(255**2 / np.square(error).mean((2, 3, 4)))
    assert report["what"] == "reconstruction"
    assert report["sampling"] is None
    assert report["result"]["psnr_db"] == pytest.approx(each.mean(), rel=1e-4)
    assert report["result"]["psnr_db_of_mean_error"] == pytest.approx(
        10 * np.log10(255**2 / np.square(error).mean()), rel=1e-4
    )
    assert report["result"]["psnr_db_by_frame"] == pytest.approx(each.mean(0), abs=0.006)
    assert (report["result"]["clips"], report["result"]["frames"]) == (3, 5)
    latents = report["result"]["latents"]
    assert 0 < latents["still_move"] < latents["other_move"]
    assert 0 < latents["still_share"] < 1
    still = still_patches(model.config.autoencoder, clips).numpy()
    moves = np.square(np.diff(stages.encode_clips(model, clips).numpy(), axis=1)).mean(-1)
    assert latents["still_share"] == pytest.approx(still.mean(), rel=1e-4)
    assert latents["still_move"] == pytest.approx(moves[still].mean() ** 0.5, rel=0.02)
    assert latents["other_move"] == pytest.approx(moves[~still].mean() ** 0.5, rel=0.02)


def test_patches_are_still_where_no_pixel_changes() -> None:
    config = tiny().autoencoder
    frames = torch.full((1, 5, 64, 64, 3), 9, dtype=torch.uint8)  # latent frames of 1, 2, 2
    frames[0, 2, 13, 40, 1] += 2  # token (1, 5), in the second latent frame and not in the third
    frames[0, 3, 0, 0] += 1
    still = still_patches(config, frames)
    assert still.shape == (1, 2, 64)
    moving = (~still[0]).nonzero().tolist()
    assert moving == [[0, 8 + 5], [1, 8 + 5]]


def test_a_number_that_is_not_finite_becomes_null(
    command: Run, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        measures, "decode_clips", lambda model, latents: held_out(0, len(latents), 3, 64).frames
    )
    report = measured(command, tmp_path / "out.json", "reconstruction", runs / "model", "--clips",
                      2, "--frames", 3)  # fmt: skip
    assert report["result"]["psnr_db"] is None
    assert report["result"]["psnr_db_of_mean_error"] is None
    assert report["result"]["psnr_db_by_frame"] == [None] * 3


def test_losses(command: Run, runs: Path, tmp_path: Path) -> None:
    report = measured(
        command, tmp_path / "out.json", "losses", runs / "model", "--clips", 3, "--batch", 2
    )
    assert set(report["result"]) == {"mar", "canvas", "static", "clips", "batch"}
    assert all(report["result"][name] > 0 for name in ("mar", "canvas", "static"))


def test_one_step(command: Run, runs: Path, tmp_path: Path) -> None:
    arguments = ("one-step", runs / "model", "--clips", 3, "--batch", 2, "--set", "flow_steps=1")
    report = measured(command, tmp_path / "out.json", *arguments)
    assert report["sampling"]["flow_steps"] == 1
    assert report["sampling"]["ar_steps"] == SAMPLING.ar_steps
    result = report["result"]
    assert set(result) == {"clips", "context", "prediction", "canvas", "copy", "autoencoder"}
    assert result["copy"]["frechet"] < result["prediction"]["frechet"]  # it was never trained
    code, out, _ = command(*arguments, "-o", tmp_path / "out.json", "--quiet")
    assert (code, out) == (0, "")
    assert json.loads((tmp_path / "out.json").read_text()) == report


def test_a_packaged_bundle_by_its_name(command: Run, tmp_path: Path) -> None:
    arguments = ("one-step", "toytable", "--clips", 2, "--set", "flow_steps=1")
    report = measured(command, tmp_path / "out.json", *arguments)
    assert report["model"]["name"] == "toytable"
    assert report["sampling"]["flow_steps"] == 1


def test_an_engine_continues_clips_as_the_sampler_does(
    bundles: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where there are more clips than the bundle takes at once, and not a multiple of it."""
    monkeypatch.setattr(torch, "autocast", lambda *_: nullcontext())  # bundles are float32
    bundle = bundles("expert")
    least = dataclasses.replace(bundle.manifest, batch=BatchRange(maximum=2))
    predictor = Predictor(create("onnxruntime", dataclasses.replace(bundle, manifest=least),
                                 device="cpu"))  # fmt: skip
    clips = Waves(frames=7).clips(0, 5)
    for use_actions in (True, False):
        theirs, ours = (
            stages.continue_clips(
                load_model(bundle), SAMPLING, clips, context=2, seed=4, first_stream=3,
                canvas=True, use_actions=use_actions, predictor=p,
            )
            for p in (None, predictor)
        )  # fmt: skip
        assert ours.canvas is not None
        for a, b in ((ours.frames, theirs.frames), (ours.canvas, theirs.canvas)):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert (a.int() - b.int()).abs().max() <= 1
        assert (ours.frames[:, :3] == clips.frames[:, :3]).all()
    latents = stages.encode_clips(load_model(bundle), clips.frames)
    decoded = stages.decode_by(predictor, latents)
    expected = stages.decode_clips(load_model(bundle), latents)
    assert decoded.shape == expected.shape == clips.frames.shape
    assert (decoded.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("one-step", ("--clips", 3, "--batch", 2, "--context", 1)),
        ("rollouts", ("--clips", 3, "--batch", 2, "--frames", 4)),
        ("long", ("--clips", 8, "--frames", 36)),
        ("reconstruction", ("--clips", 3, "--batch", 2, "--frames", 5)),
    ],
)
def test_an_engine_gives_the_figures_of_the_sampler(
    command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: Any
) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_: nullcontext())
    samplings = ("ar_steps=2", "flow_steps=1", "temporal_guidance=1", "canvas_guidance=1")
    for option in samplings if name != "reconstruction" else ():
        options = (*options, "--set", option)
    theirs, ours = (
        measured(command, tmp_path / f"{len(e)}" / "out.json", name, "toytable", *options, *e)
        for e in ((), ("--engine", "onnxruntime"))
    )
    assert (theirs.pop("engine"), ours.pop("engine")) == (None, "onnxruntime")
    figures = [[float(n) for n in re.findall(r"[0-9.]+", str(r["result"]))] for r in (theirs, ours)]
    assert figures[1] == pytest.approx(figures[0], rel=1e-3)
    assert ours | {"result": None} == theirs | {"result": None}


def test_an_engine_runs_bundles_only(command: Run, runs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    line = refused(command, output, "one-step", runs / "model", "--engine", "onnxruntime")
    told = f"make one with 'canvasmar-rt export {runs / 'model'} --output DIR'"
    assert f"this is not a bundle directory; {told}" in line
    line = refused(command, output, "one-step", "toytable", "--engine", "abacus")
    assert "no engine 'abacus'" in line


def test_an_autoencoder_s_run_is_measured_as_such(
    command: Run, model: CanvasMAR, tmp_path: Path
) -> None:
    run, output = tmp_path / "run", tmp_path / "out" / "out.json"
    save_checkpoint(run / "step_00000001", model, SAMPLING)
    (run / "step_00000001" / PROGRESS_FILE).write_text("{}")
    (run / RUN_FILE).write_text('{"stage": "autoencoder"}')
    for given in (run, run / "step_00000001"):
        line = refused(command, output, "losses", given)
        assert "step_00000001: only the autoencoder was trained" in line
    measured(command, output, "reconstruction", run, "--clips", 2, "--frames", 1)


def test_no_threads_are_too_few(command: Run, runs: Path, tmp_path: Path) -> None:
    code, _, err = command("long", runs / "model", "-o", tmp_path / "out.json", "--threads", 0)
    assert code == 2
    assert "'--threads'" in err


def test_rollouts_with_and_without_actions(command: Run, runs: Path, tmp_path: Path) -> None:
    options = ("--clips", 3, "--frames", 4, "--batch", 2)
    result = measured(command, tmp_path / "out.json", "rollouts", runs / "model", *options)[
        "result"
    ]
    with_actions, without = result["with_actions"], result["without_actions"]
    assert with_actions["frechet"] != without["frechet"]
    assert with_actions["frozen_gripper_px"] == without["frozen_gripper_px"]
    assert (without["clips"], without["frames"], without["context"]) == (3, 4, 2)
    result = measured(command, tmp_path / "out.json", "rollouts", runs / "still", *options)[
        "result"
    ]
    assert list(result) == ["without_actions"]


def test_long(command: Run, runs: Path, tmp_path: Path) -> None:
    report = measured(
        command, tmp_path / "out.json", "long", runs / "model", "--clips", 2, "--frames", 40
    )
    assert list(report["result"]["frechet_by_window"]) == ["5-20", "25-40"]
    assert len(report["result"]["colour_ratio_by_frame"]) == 40


def test_weights_on_another_grid_and_window(command: Run, runs: Path, tmp_path: Path) -> None:
    options = ("rollouts", runs / "still", "--clips", 2, "--frames", 4)
    wide = ("--set-model", "autoencoder.height=96", "--set-model", "autoencoder.width=96",
            "--set-model", "context_frames=8")  # fmt: skip
    usual = measured(command, tmp_path / "out.json", *options)
    report = measured(command, tmp_path / "out.json", *options, *wide)
    assert report["model"]["autoencoder"]["width"] == 96
    assert report["model"]["context_frames"] == 8
    true, own = report["result"]["without_actions"], usual["result"]["without_actions"]
    # the same world, seen larger: readings are in pixels of 64
    assert abs(true["frozen_gripper_px"] - own["frozen_gripper_px"]) < 0.1
    assert true["frechet"] != own["frechet"]
    many = ("--set", "flow_steps=1", "--set")  # AR steps are checked against the new grid's tokens
    report = measured(command, tmp_path / "out.json", *options, *wide, *many, "ar_steps=99")
    assert report["sampling"]["ar_steps"] == 99
    output = tmp_path / "refused.json"
    line = refused(command, output, *options, *wide, *many, "ar_steps=145")
    assert "ar_steps must lie in 1..144" in line
    line = refused(command, output, *options, *wide[:2])
    assert "ToyTable is square" in line
    line = refused(command, output, *options, *wide, "--engine", "onnxruntime")
    assert "an engine runs what was exported" in line
    line = refused(command, output, *options, "--set-model", "dim=64")
    assert "only context_frames, autoencoder.height and autoencoder.width" in line


def test_longer_windows_change_nothing_before_they_are_full(
    command: Run, runs: Path, tmp_path: Path
) -> None:
    options = ("rollouts", runs / "model", "--clips", 2, "--frames", 4)
    usual = measured(command, tmp_path / "out.json", *options)["result"]
    longer = measured(command, tmp_path / "out.json", *options, "--set-model", "context_frames=9")
    assert longer["result"] == usual


def test_frames_as_they_are_measured() -> None:
    frames = torch.randint(0, 256, (2, 3, 64, 64, 3), dtype=torch.uint8)
    assert at_resolution(frames, 64) is frames
    doubled = frames.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert at_resolution(doubled, 64).shape == frames.shape
    even = torch.full((1, 2, 96, 96, 3), 77, dtype=torch.uint8)
    assert (at_resolution(even, 64) == 77).all()


def test_ablations_and_their_plot(command: Run, runs: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "a" / "ablations.json"
    report = measured(
        command, out, "ablations", runs / "model", "--no-canvas", runs / "plain", "--clips", 2,
        "--frames", 2, "--steps", "3,1,3", "--seeds", 2,
    )  # fmt: skip
    curves = report["result"]["curves"]
    assert set(curves) == set(ABLATIONS)
    for curve in curves.values():
        assert list(curve) == ["1", "3"]
        for point in curve.values():
            assert len(set(point["seeds"])) == 2
            assert point["mean"] == pytest.approx(sum(point["seeds"]) / 2, rel=1e-4)
    assert report["weights"] != report["result"]["no_canvas_weights"]

    pictures = []
    for _ in range(2):
        picture = tmp_path / "b" / "figure.png"
        assert command("plot", out, "-o", picture) == (0, "", "")
        assert [p.name for p in picture.parent.iterdir()] == ["figure.png"]
        with Image.open(picture) as image:
            assert image.format == "PNG"
            pictures.append(np.asarray(image.convert("RGB")))
        curves["full guidance"]["3"]["seeds"][0] *= 2
        out.write_text(json.dumps(report))
    assert pictures[0].shape == (800, 1800, 3)
    different = (pictures[0] != pictures[1]).any((0, 2))
    assert not different[:850].any()
    assert different[900:].any()


def test_models_compared_and_their_plot(command: Run, runs: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "a" / "compare.json"
    names = f"canvas={runs / 'model'}", f"plain={runs / 'plain'}"
    options = ("--clips", 2, "--frames", 2, "--steps", "1,2", "--seeds", 1)
    report = measured(command, out, "compare", *names, *options)
    assert list(report["result"]["curves"]) == ["canvas", "plain"]
    assert report["result"]["models"]["plain"]["parameters"] > 0
    assert (
        report["result"]["models"]["plain"]["weights"]
        != report["result"]["models"]["canvas"]["weights"]
    )
    assert report["result"]["models"]["plain"]["sampling"] == report["sampling"]
    shutil.copytree(runs / "plain", tmp_path / "run")
    (checkpoint,) = (tmp_path / "run").rglob("config.json")
    config = json.loads(checkpoint.read_text())
    config["sampling"]["flow_steps"] += 1
    checkpoint.write_text(json.dumps(config))
    code, _, error = command("compare", names[0], f"plain={tmp_path / 'run'}", "-o", out, *options)
    assert code == 2
    assert "points measured with another models" in error
    alone = measured(command, tmp_path / "b" / "one.json", "compare", names[1], *options)
    assert alone["result"]["curves"]["plain"] == report["result"]["curves"]["plain"]
    picture = tmp_path / "c" / "figure.png"
    assert command("plot", out, "-o", picture) == (0, "", "")
    with Image.open(picture) as image:
        assert np.asarray(image.convert("L")).std() > 5
    code, _, error = command("compare", names[0], names[0], "-o", tmp_path / "c.json")
    assert code == 2
    assert "there is a canvas before" in error
    code, _, error = command("compare", "canvas", "-o", tmp_path / "c.json")
    assert code == 2
    assert "NAME=CHECKPOINT" in error


def test_interrupted_ablations_go_on(
    command: Run, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def arguments(name: str, *options: object, steps: str = "1,3") -> tuple[object, ...]:
        return ("ablations", runs / "model", "--no-canvas", runs / "plain", "-o", tmp_path / name,
                "--clips", 2, "--frames", 2, "--steps", steps, "--quiet", *options)  # fmt: skip

    predictions = 0
    last = None

    def counted(*given: Any, **options: Any) -> Continuation:
        nonlocal predictions
        predictions += 1
        if predictions == last:
            raise KeyboardInterrupt
        return stages.continue_clips(*given, **options)

    monkeypatch.setattr(measures, "continue_clips", counted)
    few = ("--seeds", 1)
    assert command(*arguments("straight.json", *few)) == (0, "", "")
    straight = json.loads((tmp_path / "straight.json").read_text())
    every = predictions
    predictions, last = 0, 6
    assert command(*arguments("parts.json", *few)) == (130, "", "interrupted\n")
    parts = json.loads((tmp_path / "parts.json").read_text())
    assert sum(len(curve) for curve in parts["result"]["curves"].values()) == 5
    predictions, last = 0, None
    assert command(*arguments("parts.json", *few)) == (0, "", "")
    assert predictions == every - 5
    assert json.loads((tmp_path / "parts.json").read_text()) == straight

    # a point more goes to those that are there
    assert command(*arguments("parts.json", *few, steps="2")) == (0, "", "")
    more = json.loads((tmp_path / "parts.json").read_text())["result"]["curves"]
    assert all(list(curve) == ["1", "2", "3"] for curve in more.values())

    kept = (tmp_path / "parts.json").read_text()
    code, _, line = command(*arguments("parts.json", "--seeds", 2, "--set", "flow_steps=1"))
    assert code == 2
    assert "parts.json: holds points measured with another sampling and seeds; choose" in line
    assert (tmp_path / "parts.json").read_text() == kept
    (tmp_path / "other.json").write_text("{}")
    code, _, line = command(*arguments("other.json"))
    assert code == 2
    assert "other.json: not written by" in line


def test_sheet(command: Run, runs: Path, tmp_path: Path) -> None:
    picture = tmp_path / "sheet.png"
    arguments = ("sheet", runs / "model", "--clips", 2, "--frames", 4, "-o", picture)
    assert command(*arguments) == (0, "", "")
    with Image.open(picture) as image:
        size = image.size
    assert command(*arguments, "--every", 1) == (0, "", "")
    with Image.open(picture) as image:
        assert image.size[0] == size[0] + 2 * (64 + 6)  # two more columns
    assert list(tmp_path.iterdir()) == [picture]


def test_pictures_are_png_by_their_names(command: Run, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    measured = tmp_path / "in" / "out.json"
    measured.write_text("{}")
    for arguments in (("sheet", runs / "model"), ("plot", measured)):
        for name in ("out.jpg", "out"):
            line = refused(command, tmp_path / name, *arguments)
            assert f"{name}: expected a name ending in .png, got" in line
    assert "not written by" in refused(command, tmp_path / "out.PNG", "plot", measured)


def test_as_a_program(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "training.evaluation", "long", str(tmp_path), "-o", "out.json"],
        capture_output=True, text=True, cwd=Path(evaluation.__file__).parents[1], timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "neither a checkpoint nor a run" in done.stderr


# Anyone's recordings


@pytest.fixture
def robot(tmp_path: Path) -> Path:
    """Six recordings of 11 frames with the two numbers of action of ToyTable, one of them cut."""
    folder = tmp_path / "data" / "test"
    folder.mkdir(parents=True)
    clips = held_out(0, 6, 11, 64)
    assert clips.actions is not None
    for i in range(6):
        np.savez(folder / f"{i}.npz", frames=clips.frames[i].numpy(), actions=clips.actions[i])
    (folder / "5.npz").write_bytes(b"PK half")
    return tmp_path / "data"


def test_recordings_beside_a_copy_and_the_autoencoder(
    command: Run, runs: Path, robot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out" / "out.json"
    arguments = ("recordings", runs / "model", "--root", robot, "--set-data", "action_dim=2",
                 "--clips", 5, "--batch", 2, "--frames", 4, "-o", output)  # fmt: skip
    code, out, err = command(*arguments)
    assert code == 0
    assert err.startswith("recordings left out: 1, the first ")
    report = json.loads(output.read_text())
    result = report["result"]
    assert json.loads(out) == result
    assert (result["clips"], result["context"], result["frames"]) == (5, 2, 4)
    assert result["actions"]
    names = ("prediction", "prediction without actions", "copy", "autoencoder")
    for name in names:
        assert len(result[name]["psnr_db_of_mean_error_by_frame"]) == 4
        assert len(result[name]["ssim_by_frame"]) == 4
    assert result["prediction"] != result["prediction without actions"]
    copy = result["copy"]
    by_frame = copy["psnr_db_of_mean_error_by_frame"]
    assert by_frame[0] > by_frame[-1]
    assert result["data"] == {
        "name": "videos", "root": str(robot), "options": {"action_dim": 2}, "split": "test",
        "seed": 0, "recordings": 6, "skipped_recordings": 1,
    }  # fmt: skip
    with Image.open(output.with_suffix(".png")) as sheet:  # four clips of three batches, six wide
        assert 8 * 64 < sheet.height < 10 * 64
        assert sheet.width > 5 * 64

    monkeypatch.setattr(measures, "continue_clips", predicting(copied))
    assert command(*arguments)[0] == 0
    result = json.loads(output.read_text())["result"]
    assert result["prediction"] == result["copy"] == copy
    source = make_source("videos", robot, split="test", action_dim=2, frames=7, height=64, width=64)
    real = torch.cat([source.clips(i, 1).frames for i in range(5)]).double()
    error = (real[:, 3:] - real[:, 2:3]).square().mean()
    assert copy["psnr_db_of_mean_error"] == pytest.approx(
        10 * np.log10(255**2 / float(error)), rel=1e-4
    )
    monkeypatch.setattr(measures, "continue_clips", predicting(perfect))
    assert command(*arguments)[0] == 0
    best = json.loads(output.read_text())["result"]["prediction"]
    assert (best["psnr_db_of_mean_error"], best["ssim"]) == (None, 1.0)  # no error at all


def test_recordings_without_actions_or_of_other_ones(
    command: Run, runs: Path, robot: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out" / "out.json"
    arguments = ("recordings", runs / "model", "--root", robot, "--clips", 2, "--frames", 2)
    assert command(*arguments, "-o", output, "--quiet")[2] == ""
    assert command(*arguments, "-o", output)[2].startswith("measured without actions: --set-data")
    result = json.loads(output.read_text())["result"]
    assert not result["actions"]
    assert "prediction without actions" not in result
    output.unlink()
    for options, reason in (
        (("--set-data", "action_dim=3"), "actions of 3 numbers a frame make 6 a step, the model's"),
        (("--split", "val"), f"{robot / 'val'}: no such folder"),
        (("--set-data", "split=val"), "--set-data split: is decided by the command itself"),
        (("--data", "bear"), "choose from bair-tfrecord"),
        (("--frames", 3), "3 predicted frames are not whole latent frames of 2"),
        (("--frames", 10), "expected at least 13 frames, got 11"),
    ):
        assert reason in refused(command, output, *arguments, *options)
    line = refused(command, output.with_suffix(".jpeg.png"), *arguments)
    assert "is for the JSON; the sheet is drawn beside it" in line
    line = refused(command, Path(os.devnull), *arguments)
    assert "the sheet is drawn beside the JSON; give the name of a file" in line


# Numbers that behave


def test_a_perfect_model_and_a_copy(
    command: Run, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("long", runs / "model", "--clips", 6, "--frames", 36, "--batch", 4)
    results = {}
    for predict in (perfect, copied, late):
        monkeypatch.setattr(measures, "continue_clips", predicting(predict))
        report = measured(command, tmp_path / "out.json", *arguments)
        results[predict.__name__] = report["result"]
    best = results["perfect"]
    assert best["frechet"] < 1e-6
    assert best["frechet_by_window"]["5-20"] < 1e-6
    assert best["frechet_by_window"]["21-36"] < 1e-6
    assert best["gripper_px"] == best["true_gripper_px"] < 0.1
    assert best["gripper_missing"] == 0
    assert best["toys_kept"] == best["true_toys_kept"] > 0.95
    assert set(best["colour_ratio_by_frame"]) == set(best["sharpness_ratio_by_frame"]) == {1.0}
    assert results["copied"]["frechet"] > 5
    assert results["copied"]["gripper_px"] > 5
    assert results["copied"]["frechet_by_window"]["21-36"] > 5
    assert results["late"]["gripper_px"] > 5 * best["gripper_px"]
    assert results["late"]["frechet"] > 1e-3


def test_one_step_is_compared_with_the_next_latent_frame(
    model: CanvasMAR, plain: CanvasMAR, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "continue_clips", predicting(perfect))
    monkeypatch.setattr(measures, "reconstruct", lambda model, frames: frames)
    options: dict[str, Any] = {"clips": 6, "context": 2, "batch": 4, "seed": 0, "tick": no_tick}
    result = measure_one_step(model, SAMPLING, **options)
    for name in ("prediction", "canvas", "autoencoder"):
        assert result[name]["frechet"] < 1e-6, name
        assert result[name]["gripper_penalised_px"] < 0.1, name
    assert result["copy"]["frechet"] > 0.1
    assert result["copy"]["gripper_penalised_px"] > 0.5
    assert "canvas" not in measure_one_step(plain, SAMPLING, **options)
    monkeypatch.setattr(measures, "continue_clips", predicting(copied))
    assert measure_one_step(model, SAMPLING, **options)["prediction"] == result["copy"]


def test_what_comes_back_from_under_the_arm(
    command: Run, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("recall", runs / "model", "--clips", 12)
    found = {}
    for predict in (perfect, copied):
        monkeypatch.setattr(measures, "continue_clips", predicting(predict))
        found[predict] = measured(command, tmp_path / "out.json", *arguments)["result"]
    best, worst = found[perfect], found[copied]
    assert (best["area"], best["kept"]) == (1.0, 1.0)
    assert worst["kept"] == 0.0
    assert worst["area"] < 0.3
    for result in (best, worst):
        parts = result["by_hidden_latent_frames"]
        assert sum(part["toys"] for part in parts.values()) == result["toys"] == best["toys"] > 2
    line = refused(command, tmp_path / "none.json", *arguments[:2], "--clips", 2, "--frames", 5)
    assert "no toy comes back in 2 clips of 5 frames; take more" in line


def test_a_toy_returns_that_was_seen_before_it_was_hidden() -> None:
    for share, hidden in (
        ([1.0, 0.1, 0.9], 1),
        ([0.7, 0.3, 0.1, 0.0, 0.7], 2),
        ([0.7, 0.1, 0.5], None),  # half of it still is
        ([0.1, 0.0, 0.9], None),  # nobody has seen it
        ([0.5, 0.1, 0.9], None),  # nor here
        ([0.9, 0.3, 0.9], None),  # it was there all the time
    ):
        values = torch.tensor(share)
        assert measures._returns(values) == (hidden is not None), share
        if hidden is not None:
            assert measures._hidden_for(values[:-1]) == hidden


@pytest.mark.parametrize(("spoilt", "inside"), [(4, False), (5, True), (8, True), (9, False)])
def test_windows_are_counted_from_the_first_predicted_frame(
    spoilt: int, inside: bool, model: CanvasMAR, monkeypatch: pytest.MonkeyPatch
) -> None:
    def predict(frames: Tensor, given: int) -> Tensor:
        out = frames.clone()
        out[:, given + spoilt - 1] = 0
        return out

    monkeypatch.setattr(measures, "continue_clips", predicting(predict))
    options: dict[str, Any] = {"clips": 2, "frames": 10, "context": 3, "batch": 2, "seed": 0}
    result = measure_rollouts(model, SAMPLING, **options, tick=no_tick, windows=((5, 8),))
    assert (result["frechet_by_window"]["5-8"] > 1) == inside
    assert result["frechet"] > 1
    for window in ((0, 4), (5, 5), (9, 11)):
        with pytest.raises(InputError, match="two or more of frames 1-10"):
            measure_rollouts(model, SAMPLING, **options, tick=no_tick, windows=(window,))


def test_a_clip_is_predicted_alike_in_every_batch(
    model: CanvasMAR, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Tensor] = []

    def spying(*arguments: Any, **options: Any) -> Continuation:
        shown = stages.continue_clips(*arguments, **options)
        made.append(shown.frames)
        return shown

    monkeypatch.setattr(measures, "continue_clips", spying)

    def predictions(batch: int, seed: int) -> tuple[Tensor, dict[str, Any], int]:
        made.clear()
        ticks: list[int] = []
        report = measure_rollouts(
            model, SAMPLING, clips=5, frames=6, context=2, batch=batch, seed=seed,
            tick=ticks.append,
        )  # fmt: skip
        assert sum(ticks) == 5
        return torch.cat(made).int(), report, len(made)

    whole, report, calls = predictions(5, 0)
    assert calls == 1
    assert not torch.equal(whole[0, 3:], whole[1, 3:])
    for batch in (1, 2):
        other, again, calls = predictions(batch, 0)
        assert calls == -(-5 // batch)
        # rounding may flip the order of two tokens now and then
        assert float(((other - whole).abs() > 2).float().mean()) < 0.01
        assert again["frechet"] == pytest.approx(report["frechet"], rel=0.01)
    seeded, _, _ = predictions(5, 1)
    assert torch.equal(seeded[:, :3], whole[:, :3])
    assert float((seeded - whole)[:, 3:].abs().float().mean()) > 1


def test_every_clip_has_its_own_noise_of_the_seed_asked_for(
    model: CanvasMAR, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "reconstruct", lambda model, frames: frames)
    rows: list[int] = []

    def spying(
        network: CanvasMAR, sampling: SamplingConfig, clips: Clips, **options: Any
    ) -> Continuation:
        first, (count, length) = options["first_stream"], clips.frames.shape[:2]
        true = held_out(first, count, length, 64)
        assert options["seed"] == 9
        assert torch.equal(clips.frames, true.frames)
        assert clips.actions is not None
        assert true.actions is not None
        assert torch.equal(clips.actions, true.actions)
        rows.extend(range(first, first + count))
        return predicting(perfect)(network, sampling, clips, **options)

    monkeypatch.setattr(measures, "continue_clips", spying)
    options: dict[str, Any] = {"seed": 9, "tick": no_tick}
    few = options | {"clips": 3, "context": 2, "batch": 2}
    recorded = ToyTableSource(frames=7, seed=stages.HELD_OUT_SEED)
    for measure in (
        lambda: measure_one_step(model, SAMPLING, **few),
        lambda: measure_rollouts(model, SAMPLING, frames=4, **few),
        lambda: measure_recordings(model, SAMPLING, recorded, **few),
    ):
        rows.clear()
        measure()
        assert sorted(set(rows)) == [0, 1, 2]
    rows.clear()
    measure_recall(model, SAMPLING, clips=6, frames=33, **options)
    assert max(rows) > 0


def test_ablations_compare_the_same_clips(
    model: CanvasMAR, plain: CanvasMAR, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[bool, SamplingConfig, tuple[int, ...], int]] = []

    def spying(
        network: CanvasMAR, sampling: SamplingConfig, clips: Clips, **options: Any
    ) -> Continuation:
        first = options["first_stream"]
        rows = range(first, first + len(clips.frames))
        assert torch.equal(clips.frames, held_out(first, len(rows), 5, 64).frames)
        calls.append((network is plain, sampling, tuple(rows), options["seed"]))
        predict = copied if network is plain else perfect
        return predicting(predict)(network, sampling, clips, **options)

    monkeypatch.setattr(measures, "continue_clips", spying)
    base = dataclasses.replace(SAMPLING, order="maskgit", temporal_guidance=1.3, solver="heun")
    ticks: list[int] = []
    result = measure_ablations(
        model, plain, base, steps=(1, 2), seeds=2, clips=3, frames=2, context=2, batch=2,
        tick=ticks.append,
    )  # fmt: skip
    assert sum(ticks) == 6 * 2 * 2 * 3
    seen: dict[tuple[bool, SamplingConfig], list[tuple[int, tuple[int, ...]]]] = {}
    for is_plain, sampling, rows, seed in calls:
        seen.setdefault((is_plain, sampling), []).append((seed, rows))
    assert len(seen) == 12
    same = [(0, (0, 1)), (0, (2,)), (1, (3, 4)), (1, (5,))]
    assert all(rows == same for rows in seen.values())
    wanted = {
        (name == "no canvas", dataclasses.replace(base, ar_steps=k, **changes))
        for name, changes in ABLATIONS.items()
        for k in (1, 2)
    }
    assert set(seen) == wanted
    assert {sampling.order for _, sampling in seen} == {"random", "motion"}
    assert {sampling.solver for _, sampling in seen} == {"heun"}
    for name, curve in result["curves"].items():
        distances = [value for point in curve.values() for value in point["seeds"]]
        assert all((value > 0.1) == (name == "no canvas") for value in distances), name
    assert result["copy"] == result["curves"]["no canvas"]["1"]["mean"]


# Losses


def test_models_with_and_without_a_canvas_see_the_same_noise_and_masks(
    model: CanvasMAR, plain: CanvasMAR, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flow head's input, (1 - u) * noise + u * target, is made of all of them."""
    plain = build(plain.config, seed=1).eval()
    plain.autoencoder.load_state_dict(model.autoencoder.state_dict())
    inputs: dict[str, list[Tensor]] = {"model": [], "plain": []}
    losses = {}
    for name, network in (("model", model), ("plain", plain)):
        velocity = network.flow.velocity

        def spying(x: Tensor, *rest: Tensor, name: str = name, velocity: Any = velocity) -> Tensor:
            inputs[name].append(x)
            out: Tensor = velocity(x, *rest)
            return out

        monkeypatch.setattr(network.flow, "velocity", spying)
        losses[name] = measure_losses(network, clips=3, batch=2, tick=no_tick)
    assert len(inputs["model"]) == 2
    for one, other in zip(inputs["model"], inputs["plain"], strict=True):
        torch.testing.assert_close(one, other)
    assert "canvas" not in losses["plain"]
    assert losses["plain"]["mar"] != losses["model"]["mar"]
    assert measure_losses(model, clips=3, batch=2, tick=no_tick) == losses["model"]


def test_alike_draws_are_keyed_by_step_shape_and_count() -> None:
    def draws(step: int = 0) -> AlikeDraws:
        return AlikeDraws(torch.device("cpu"), seed=0, step=step, batch=2)

    one = draws()
    first, second = one.normal(4, 2), one.normal(4, 2)
    assert not torch.equal(first, second)
    other = draws()
    other.uniform(4, 2)
    other.normal(7)
    torch.testing.assert_close(other.normal(4, 2), first)
    torch.testing.assert_close(other.normal(4, 2), second)
    assert not torch.equal(draws(step=1).normal(4, 2), first)
    ratio, of_groups = draws().shared_uniform(), draws()
    assert of_groups.shared_uniform("begin") != ratio
    assert of_groups.shared_uniform() == ratio
    assert 0 <= float(one.uniform(100).min()) < float(one.uniform(100).max()) < 1


def test_losses_are_means_over_clips_in_evaluation_mode(
    model: CanvasMAR, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Spy(torch.nn.Module):
        def __init__(self, network: CanvasMAR, config: ModelTraining) -> None:
            super().__init__()
            self.network = network

        def forward(
            self, latents: Tensor, actions: Tensor | None, draws: AlikeDraws
        ) -> tuple[Tensor, dict[str, Tensor]]:
            ratios.append(draws.shared_uniform())
            assert not any(module.training for module in self.modules())
            assert not torch.is_grad_enabled()
            assert actions is not None
            assert actions.shape == (len(latents), 8, 4)
            return latents.sum(), {"mean": latents.mean(), "action": actions.mean()}

    monkeypatch.setattr(measures, "model_loss", Spy)
    ratios: list[float] = []
    ticks: list[int] = []
    result = measure_losses(model, clips=3, batch=2, tick=ticks.append)
    clips = held_out(0, 3, 17, 64)
    assert clips.actions is not None
    assert ticks == [2, 1]
    assert ratios[0] != ratios[1]  # every batch has its own
    latents = stages.encode_clips(model, clips.frames)
    assert result["mean"] == pytest.approx(float(latents.mean()), rel=1e-4)
    assert result["action"] == pytest.approx(float(clips.actions.mean()), rel=1e-4)


# What is refused


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("rollouts", "{none}"), "neither a checkpoint nor a run"),
        (("rollouts", "{cut}"), "model.safetensors: cannot be read"),
        (("rollouts", "{small}"), "ToyTable has 64x64 pixels .* takes 32x32"),
        (("rollouts", "{model}", "--frames", 15), "15 predicted frames are not whole latent"),
        (("rollouts", "{model}", "--set", "steps=3"), "no option 'steps'; there are ar_steps"),
        (("rollouts", "{model}", "--set", "ar_steps=many"), "ar_steps: expected int"),
        (("rollouts", "{model}", "--set", "ar_steps"), "expected name=value"),
        (("one-step", "{model}", "--set", "ar_steps=65"), r"ar_steps must lie in 1\.\.64"),
        (("losses", "{model}", "--device", "toaster"), "device 'toaster' cannot be had"),
        (("long", "{model}", "--frames", 34), "at least 36 frames"),
        (("reconstruction", "{model}", "--frames", 4), r"wants 1 \+ n\*2"),
        (("ablations", "{model}", "--no-canvas", "{model}"), "with a canvas, and the other one"),
        (("ablations", "{model}", "--no-canvas", "{plain}", "--steps", "1,x"), "whole numbers"),
        (("ablations", "{model}", "--no-canvas", "{plain}", "--steps", "0"), r"1\.\.64"),
        (("ablations", "{model}", "--no-canvas", "{plain}", "--frames", 3), "3 predicted frames"),
        (("sheet", "{model}", "--frames", 5), "5 predicted frames"),
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple[object, ...], reason: str, command: Run, runs: Path, tmp_path: Path
) -> None:
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "config.json").write_bytes((runs / "model" / "config.json").read_bytes())
    (cut / "model.safetensors").write_bytes(
        (runs / "model" / "model.safetensors").read_bytes()[:-9]
    )
    places = {name: runs / name for name in ("model", "plain", "small", "none")} | {"cut": cut}
    filled = [str(argument).format(**places) for argument in arguments]
    output = tmp_path / ("out.png" if filled[0] == "sheet" else "out.json")
    line = refused(command, output, *filled, *_few(filled[0]))
    assert re.search(reason, line), line
    assert list(tmp_path.iterdir()) == [cut]


def _few(name: str) -> tuple[object, ...]:
    return () if name == "sheet" else ("--clips", 2)


def test_an_option_that_does_not_exist(command: Run, runs: Path, tmp_path: Path) -> None:
    code, _, err = command("long", runs / "model", "-o", tmp_path / "out.json", "--clip", 3)
    assert code == 2
    assert "No such option" in err
    assert list(tmp_path.iterdir()) == []


def test_output_that_cannot_be_written(command: Run, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path, tmp_path / "file" / "out.json"):
        line = refused(command, output, "long", runs / "model")  # at once, not hours later
        assert "cannot be written" in line


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_file_is_written_whole_or_not_at_all(
    error: BaseException, command: Run, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.json"
    output.write_text("the one before")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, "replace", fail)
    code, out, err = command("reconstruction", runs / "model", "--clips", 2, "--frames", 1, "-o",
                             output)  # fmt: skip
    assert code != 0
    assert out == ""
    if isinstance(error, OSError):
        assert code == 2
        assert err == f"error: {output}: cannot be written (disk full)\n"
    assert output.read_text() == "the one before"
    assert list(tmp_path.iterdir()) == [output]


def test_plot_refuses_other_files(
    command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, source = tmp_path / "out.png", tmp_path / "in.json"
    assert "cannot be read as JSON" in refused(command, picture, "plot", source)
    point = {"2": {"seeds": [1.0, 2.0]}}
    good = {"clips": 2, "frames": 16, "curves": dict.fromkeys(ABLATIONS, point)}
    cases: dict[str, object] = {
        "ablations` or `compare`": {"what": "long", "result": good},
        "no curve 'no canvas'": {"what": "ablations", "result": {**good, "curves": {}}},
        "no curve 'full guidance'": {
            "what": "ablations",
            "result": {**good, "curves": {**good["curves"], "full guidance": {"2": {"seeds": []}}}},  # type: ignore[dict-item]
        },
    }
    pytest.importorskip("matplotlib")
    for reason, report in cases.items():
        source.write_text(json.dumps(report))
        assert reason in refused(command, picture, "plot", source)
    source.write_text(json.dumps({"what": "ablations", "result": good}))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "plot needs matplotlib: pip install" in refused(command, picture, "plot", source)


def test_override() -> None:
    config = tiny()
    assert override(config, None) == config
    changed = override(config, ["flow.modulation=additive", "canvas=false", "autoencoder.blocks=2"])
    assert changed.flow.modulation == "additive"
    assert not changed.canvas
    assert changed.autoencoder == dataclasses.replace(config.autoencoder, blocks=2)
    for wrong, reason in {
        "flow.widht=3": "no option 'flow.widht'; there are blocks, modulation, width",
        "dim.x=3": "no option 'dim.x'",
        "flow=3": "expected an object",
        "dim=2.5": "expected int",
    }.items():
        with pytest.raises(ConfigError, match=reason):
            override(config, [wrong])


# The papers' protocols


def shades(video: int, frames: int = 24, size: int = 64) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Frames of one grey each, one level more at every step, a little lighter to the right."""
    level = 5 * video + np.arange(frames)[:, None, None, None]
    slope = np.arange(size)[None, None, :, None]
    return np.broadcast_to(level + slope, (frames, size, size, 3)).astype(np.uint8)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """BAIR as folders of pictures: four trajectories, and one that is too short."""
    for video in range(5):
        folder = tmp_path / "bair" / "test" / str(video)
        folder.mkdir(parents=True)
        for i, frame in enumerate(shades(video, frames=24 if video != 2 else 9)):
            Image.fromarray(frame).save(folder / f"{i}.png")
    return tmp_path / "bair"


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    folder = tmp_path / "videos" / "test"
    folder.mkdir(parents=True)
    for video in range(3):
        np.savez(folder / f"{video}.npz", frames=shades(video))
    return tmp_path / "videos"


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("networks")
    save_scripted(StandIn(), folder / "i3d.pt")
    save_scripted(Distance(), folder / "lpips.pt")
    return folder


def source_of(protocol: Protocol, root: Path) -> RecordedClips:
    frames = protocol.conditioning + protocol.predicted
    return make_source("bair-frames", root, frames=frames, height=64, width=64, split="test")


def colours(clips: Tensor) -> Tensor:
    """Features that tell which frames a clip shows."""
    return clips[:, [0, -1], 0, 0, 0].float()


def brightening(wrong_by: Callable[[int], int]) -> Callable[..., Continuation]:
    """A stand-in for `continue_clips` that knows `shades`; stream s is off by `wrong_by(s)`."""

    def continued(
        model: CanvasMAR, sampling: SamplingConfig, clips: Clips, *, context: int, seed: int,
        first_stream: int,
    ) -> Continuation:  # fmt: skip
        given = 1 + (context - 1) * model.config.autoencoder.temporal_compression
        assert clips.actions is None
        steps = torch.arange(1, clips.frames.shape[1] - given + 1)[:, None, None, None]
        off = torch.tensor([wrong_by(first_stream + i) for i in range(len(clips.frames))])
        ahead = clips.frames[:, given - 1 : given] + steps + off[:, None, None, None, None]
        return Continuation(frames=torch.cat([clips.frames[:, :given], ahead.byte()], dim=1))

    return continued


def test_protocol_of_a_perfect_model_and_of_a_copy(
    model: CanvasMAR, folders: Path, networks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    protocol = dataclasses.replace(BAIR, samples=3, recordings=4)
    lpips = protocols.Lpips(networks / "lpips.pt")
    ticks: list[int] = []

    def measure(wrong_by: Callable[[int], int]) -> dict[str, Any]:
        ticks.clear()
        monkeypatch.setattr(protocols, "continue_clips", brightening(wrong_by))
        return measure_protocol(
            model, SAMPLING, protocol, source_of(protocol, folders), colours, lpips=lpips,
            batch=5, tick=ticks.append,
        )  # fmt: skip

    best = measure(lambda stream: 0)
    assert (best["real_clips"], best["generated_clips"], best["skipped_recordings"]) == (4, 12, 1)
    assert (best["recordings"], best["whole_protocol"]) == (5, False)  # a place is missing
    assert best["frechet"] < 2  # not 0: of 4 clips and of the same thrice, covariances differ
    assert best["psnr_db"] == {"mean": 100.0, "best": 100.0}
    assert best["ssim"] == {"mean": pytest.approx(1), "best": pytest.approx(1)}
    assert best["lpips"] == {"mean": 0.0, "best": 0.0}
    assert ticks == [5, 5, 2]

    mixed = measure(lambda stream: 10 * (stream % 3))  # of each place, one is right
    psnr = 20 * np.log10(255 / np.array([10, 20]))
    assert mixed["psnr_db"]["best"] == 100
    assert mixed["psnr_db"]["mean"] == pytest.approx((100 + psnr.sum()) / 3)
    assert mixed["lpips"]["best"] == 0
    assert mixed["lpips"]["mean"] == pytest.approx(10 / 127.5, rel=1e-4)
    assert mixed["frechet"] > 50

    shutil.rmtree(folders / "test" / "2")
    assert measure(lambda stream: 0)["whole_protocol"]
    source = source_of(protocol, folders)
    source.skipped["test/7"] = "missing"  # as a list names recordings that are not there
    result = measure_protocol(model, SAMPLING, protocol, source, colours, batch=5)
    assert not result["whole_protocol"]


def test_figures_of_a_protocol_are_by_place_and_at_its_size(
    model: CanvasMAR, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    protocol = dataclasses.replace(BAIR, samples=3, resolution=32)
    seeds, sizes = set(), set()
    predict = brightening(lambda s: 10 * (s % 3 + 1) if s >= 3 else 0)  # place 0 is right

    def continued(*arguments: Any, **options: Any) -> Continuation:
        seeds.add(options["seed"])
        return predict(*arguments, **options)

    def distance(real: Tensor, made: Tensor) -> Tensor:
        sizes.add(tuple(real.shape[2:4]))
        return (real.float() - made.float()).abs().mean((-1, -2, -3))

    monkeypatch.setattr(protocols, "continue_clips", continued)
    result = measure_protocol(
        model, SAMPLING, protocol, source_of(protocol, folders), colours,
        lpips=distance, batch=5, seed=7,  # type: ignore[arg-type]
    )  # fmt: skip
    assert (seeds, sizes) == ({7}, {(32, 32)})
    want = {"mean": 15.0, "best": 7.5}  # of four places, one of them right
    assert result["lpips"] == pytest.approx(want, rel=1e-3)


def test_random_places_are_windows_of_the_recordings(
    model: CanvasMAR, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocols, "continue_clips", brightening(lambda stream: 0))
    seen: list[Tensor] = []

    def features(clips: Tensor) -> Tensor:
        assert clips.shape[1:] == (16, 64, 64, 3)
        seen.append(clips[:, 0, 0, 0, 0])
        return colours(clips)

    options: dict[str, Any] = {"batch": 4, "clips": 18}
    source = source_of(BAIR_DEBIASED, folders)
    result = measure_protocol(model, SAMPLING, BAIR_DEBIASED, source, features, **options)
    assert (result["real_clips"], result["generated_clips"]) == (18, 18)
    assert not result["whole_protocol"]
    assert result["frechet"] < 1e-6
    assert list(result["psnr_db"]) == ["mean"]
    real = [int(clips) for clips in seen if len(clips) == 1]
    assert len(set(real)) > 9  # of up to 8 places in each of 4
    again = source_of(BAIR_DEBIASED, folders)
    assert measure_protocol(model, SAMPLING, BAIR_DEBIASED, again, colours, **options) == result


def test_predictions_are_cut_to_the_frames_asked_for_and_read_the_context_alone() -> None:
    ae = dataclasses.replace(tiny().autoencoder, temporal_compression=4)
    network = build(tiny(autoencoder=ae, action_dim=0), seed=0).eval()
    clips = held_out(0, 2, 13, 64)
    whole = stages.continue_clips(
        network, SAMPLING, Clips(frames=clips.frames, actions=None), context=2, seed=3,
        first_stream=7,
    )  # fmt: skip
    made = predict_frames(network, SAMPLING, clips.frames[:, :5], 6, seed=3, first_stream=7)
    assert torch.equal(made, whole.frames[:, 5:11])
    assert [context_frames(network, n) for n in (1, 5, 9)] == [1, 2, 3]
    for frames in (0, 3, 4):
        with pytest.raises(InputError, match=r"a context of \d frames: the model takes 1 \+ n\*4"):
            context_frames(network, frames)
    with pytest.raises(InputError, match="a context of 3 frames"):
        predict_frames(network, SAMPLING, clips.frames[:, :3], 4, seed=0)


def test_protocol_refuses_what_does_not_fit(model: CanvasMAR, folders: Path) -> None:
    with pytest.raises(InputError, match="expected clips of 21 frames of 64x64, got 17"):
        measure_protocol(model, SAMPLING, KINETICS600, source_of(BAIR, folders), colours)
    with pytest.raises(ConfigError, match="has 5 clips here, 6 were asked for"):
        measure_protocol(model, SAMPLING, BAIR, source_of(BAIR, folders), colours, clips=6)


def test_protocol_command_on_folders_of_pictures(
    command: Run, runs: Path, folders: Path, networks: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out" / "bair.json"
    code, out, err = command(
        "protocol", "bair", runs / "model", "--root", folders, "--data", "bair-frames", "--i3d",
        networks / "i3d.pt", "--lpips", networks / "lpips.pt", "--clips", 3, "--samples", 2,
        "-o", output,
    )  # fmt: skip
    assert code == 0
    assert err.startswith(f"recordings left out: 1, the first {folders}")
    report = json.loads(output.read_text())
    assert json.loads(out) == (result := report["result"])
    assert (result["protocol"], result["real_clips"], result["generated_clips"]) == ("bair", 3, 6)
    assert result["frechet"] > 0
    assert set(result["psnr_db"]) == set(result["ssim"]) == set(result["lpips"]) == {"mean", "best"}
    assert len(result["i3d_sha256"]) == 64
    assert result["data"] == {"name": "bair-frames", "root": str(folders)}
    assert result["split"] == "test"
    assert result["autocast"] == "bfloat16"
    assert [p.name for p in output.parent.iterdir()] == ["bair.json"]


def test_protocol_command_on_archives(
    command: Run, runs: Path, archives: Path, networks: Path, tmp_path: Path
) -> None:
    report = measured(
        command, tmp_path / "out" / "k600.json", "protocol", "kinetics600", runs / "model",
        "--root", archives, "--data", "videos", "--i3d", networks / "i3d.pt", "--clips", 4,
        "--set-data", "workers=2",
    )  # fmt: skip
    result = report["result"]
    assert (result["conditioning"], result["predicted"], result["real_clips"]) == (5, 16, 4)
    assert list(result["psnr_db"]) == ["mean"]
    assert "lpips" not in result
    assert not result["whole_protocol"]


def test_protocol_command_refuses(
    command: Run, runs: Path, archives: Path, networks: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.json"
    options = ("--root", archives, "--i3d", networks / "i3d.pt")
    line = refused(command, output, "protocol", "imagenet", runs / "model", *options)
    assert f"no protocol 'imagenet'; there are {', '.join(PROTOCOLS)}" in line
    none = ("--root", archives, "--i3d", tmp_path / "none.pt")
    line = refused(command, output, "protocol", "bair", runs / "model", *none)
    assert "there is no file" in line
    assert "i3d_torchscript.pt" in line
    line = refused(command, output, "protocol", "bair", runs / "model", *options)
    assert "*.tfrecords" in line
    line = refused(command, output, "protocol", "ucf101", runs / "model", *options)
    assert "testlist01.txt: cannot be read" in line


def test_other_numbers_of_samples_are_no_whole_protocol(
    model: CanvasMAR, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    shutil.rmtree(folders / "test" / "2")
    protocol = dataclasses.replace(BAIR, samples=3, recordings=4)
    monkeypatch.setattr(protocols, "continue_clips", brightening(lambda stream: 0))

    def whole(**options: Any) -> bool:
        source = source_of(protocol, folders)
        return measure_protocol(model, SAMPLING, protocol, source, colours, **options)[
            "whole_protocol"
        ]

    assert whole()
    assert not whole(samples=2)
    assert not whole(clips=3)
    assert not whole(usual=False)
    protocol = dataclasses.replace(BAIR, samples=3)  # BAIR has 256, as folders of which 4 are here
    assert not whole()
