"""The command line as a user meets it: in a process of its own."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from canvasmar_rt import cli
from canvasmar_rt.bundle import DEMO_CLIP, PACKAGED, Bundle
from canvasmar_rt.cli import DEFAULT_MODEL, GPU_MODEL
from canvasmar_rt.errors import BundleError, ConfigError
from canvasmar_rt.models import families
from canvasmar_rt.video import read_clip

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "-m", "canvasmar_rt.cli"]


def run(
    *arguments: object, cwd: Path, code: int = 0, columns: int = 120
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=120,
        check=False, env={**os.environ, "COLUMNS": str(columns)},
    )  # fmt: skip
    assert done.returncode == code, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done


def decoded(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def test_demo_writes_a_video_and_a_sheet(tmp_path: Path) -> None:
    done = run("demo", cwd=tmp_path)
    frames = decoded(tmp_path / "canvasmar_demo.mp4")
    assert frames.shape == (5 + 16, 64, 64, 3)
    with np.load(DEMO_CLIP) as archive:
        context = archive["frames"][:5]
    assert np.abs(frames[:5].astype(int) - context).mean() < 8  # H.264 of the real frames
    with Image.open(tmp_path / "canvasmar_demo_sheet.png") as sheet:
        assert sheet.width > 1000
    assert "weights: " in done.stdout


def test_a_closed_output_is_nobody_s_business(tmp_path: Path) -> None:
    """As a daemon starts it: what it would print goes nowhere, and into no file of its own."""
    script = f"exec {shlex.join(COMMAND)} demo --frames 2 -o a.mp4 >&- 2>&-"
    assert subprocess.run(["sh", "-c", script], cwd=tmp_path, timeout=120).returncode == 0
    assert len(decoded(tmp_path / "a.mp4")) == 7


def test_more_frames_than_the_clip_has_actions_for(tmp_path: Path) -> None:
    done = run("demo", "--frames", 29, cwd=tmp_path, code=2)
    assert "its actions lead to 33 frames, context and prediction want 35; ask for fewer" in (
        done.stderr
    )
    assert not list(tmp_path.iterdir())


def test_predict_with_every_option(tmp_path: Path) -> None:
    done = run(
        "predict", DEMO_CLIP, "--output", "out/future.gif", "--frames", 7, "--context", 4,
        "--steps", 3, "--flow-steps", 5, "--solver", "ab2", "--seed", 9, "--batch", 2, "--fps", 10,
        "--temporal-guidance", 1, "--canvas-guidance", 2, "--order", "random", "--actions",
        "--threads", 1, "--json", cwd=tmp_path,
    )  # fmt: skip
    summary = json.loads(done.stdout)
    assert summary["context_frames"] == 3  # the longest 1 + n*2 within 4
    assert summary["predicted_frames"] == 7
    assert summary["latent_frames"] == 4
    with Image.open(tmp_path / "out" / "future.gif") as picture:
        assert picture.size == (128, 64)  # two futures side by side
        assert 2 <= picture.n_frames <= 10
    assert (tmp_path / "out" / "future_sheet.png").is_file()


@pytest.mark.parametrize("actions", [False, True])
def test_predict_says_that_a_clips_actions_are_not_used(actions: bool, tmp_path: Path) -> None:
    told = ["--actions"] if actions else []
    done = run("predict", DEMO_CLIP, "-o", "x.mp4", "--frames", 2, *told, cwd=tmp_path)
    assert ("actions are not used; --actions" in done.stderr) != actions


def test_same_seed_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        run("demo", "-o", f"{name}.mp4", "--seed", 3, "--quiet", cwd=tmp_path)
    np.testing.assert_array_equal(decoded(tmp_path / "a.mp4"), decoded(tmp_path / "b.mp4"))
    run("demo", "-o", "c.mp4", "--seed", 4, "--quiet", cwd=tmp_path)
    assert (decoded(tmp_path / "a.mp4") != decoded(tmp_path / "c.mp4")).any()


def test_a_folder_of_clips_skips_the_broken_one(tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in ("a.npz", "b.npz"):
        shutil.copy(DEMO_CLIP, folder / name)
    (folder / "broken.mp4").write_bytes(b"not a video")
    shutil.copy(DEMO_CLIP, folder / f"{'a' * 251}.npz")  # its sheet has no name
    done = run("predict", folder, "-o", "out", "--frames", 2, "--quiet", cwd=tmp_path, code=1)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "a.mp4", "a_sheet.png", "b.mp4", "b_sheet.png"
    }  # fmt: skip
    assert "broken.mp4" in done.stderr
    assert "File name too long" in done.stderr
    assert "2 of 4 clips failed" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "nowhere.mp4", "-o", "x.mp4"], "nowhere.mp4: no such file or folder"),
        (["predict", DEMO_CLIP, "-o", "x.mp4", "--threads", "100000"], r"1\.\.1024, got 100000"),
        (["predict", DEMO_CLIP, "-o", "x.avi"], r"\.mp4"),
        (["predict", DEMO_CLIP, "-o", "x.mp4", "--frames", "0"], "frames: at least 1"),
        (["predict", DEMO_CLIP, "-o", "x.mp4", "--context", "0"], "context: at least 1"),
        (["predict", DEMO_CLIP, "-o", "x.mp4", "--context", "99"], "99.*a shorter context"),
        (["predict", DEMO_CLIP, "-o", "x.mp4", "--steps", "65"], r"1\.\.64"),
        (["predict", DEMO_CLIP, "-o", "x.mp4", "--batch", "33"], r"--batch-max"),
        (["predict", DEMO_CLIP, "-o", "x.mp4", "--solver", "rk4"], "euler"),
        (["predict", DEMO_CLIP, "-o", "x.mp4", "--model", "nothing"], "toytable"),
        (["predict", DEMO_CLIP, "-o", "x.mp4", "--engine", "jax"], "onnxruntime, torch"),
        (["predict", DEMO_CLIP, "-o", "x.mp4", "--device", "cuda"], "cuda"),
        (["predict", DEMO_CLIP, "-o", "x.mp4", "--fps", "0"], "fps"),
        (["predict", DEMO_CLIP, "-o", "x.mp4", "--frames", "99", "--actions"], "actions"),
        (["predict", DEMO_CLIP, "-o", "x.mp4", "--flow-steps", "1001"], r"1\.\.1000"),
        (["predict", DEMO_CLIP, "-o", "x.mp4", "--frames", "100001"], "too many"),
        (["predict", DEMO_CLIP, "-o", "x.mp4", "--context", "1" + 19 * "0"], "too many"),
        (["predict", DEMO_CLIP, "-o", f"{DEMO_CLIP}/x.mp4"], "not a folder"),
        (["predict", DEMO_CLIP, "-o", "x.mp4", "--actions", "--fps", "5"], "leave out start, fps"),
        (["bench", "--json", f"{DEMO_CLIP}/x.json"], "cannot be written"),
        (["export", "bare", "-o", "x"], "bair, ucf101, kinetics600, toytable"),
        (
            ["export", "toytable", "-o", "x", "--batch-min", "4", "--batch-opt", "2"],
            "minimum <= optimum",
        ),
        (["export", "toytable", "-o", "x", "--dtype", "fp4"], "fp32, fp16, bf16"),
        (["export", "toytable", "-o", "x", "--card", "nowhere.md"], "nowhere.md"),
        (["verify", "nowhere"], "nowhere"),
        (["info", "nowhere"], "nowhere"),
        (["bench", "--batch", "many"], "1,8,32"),
        (["bench", "--json", "p/clip.png", "--plot", "p"], r"p/clip.png lies where --plot draws"),
        (["bench", "--baseline", "dream"], "eager, "),
        (["bench", "--profile", "slow"], "default, fast"),
        (["predict", DEMO_CLIP, "-o", "x.mp4", "--model", ""], "not a bundle directory"),
        (["predict", DEMO_CLIP, "-o", "x.mp4", "--profile", ""], "default, fast"),
        (["bench", "--scale", "2"], "--preset"),
        (["export", "toytable", "-o", "x", "--fast", "speed=2"], "speed"),
    ],
    ids=lambda a: "-".join(map(str, a))[-60:] if isinstance(a, list) else "",
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = run(*arguments, cwd=tmp_path, code=2)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert re.search(message, lines[0])
    assert not list(tmp_path.iterdir())


def test_a_place_that_is_taken_is_told_before_a_model_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kinetics600 takes a minute and three gigabytes."""
    monkeypatch.setattr(families, "build", lambda *_: pytest.fail("a model was made"))
    arguments = ["export", "kinetics600", "-o", str(tmp_path)]
    (tmp_path / "notes.txt").touch()
    refused = CliRunner().invoke(cli.app, arguments)
    assert isinstance(refused.exception, BundleError)
    assert "exists and is not a bundle" in str(refused.exception)


def test_verify_info_doctor_and_bench_answer(tmp_path: Path) -> None:
    report = json.loads(run("verify", GPU_MODEL, "--json", cwd=tmp_path).stdout)
    assert max(report["drift"]) < 1e-3
    assert "within tolerance" in run("verify", GPU_MODEL, cwd=tmp_path).stdout
    assert "733M" in run("info", "kinetics600", cwd=tmp_path).stdout
    assert json.loads(run("info", "bair", "--json", cwd=tmp_path).stdout)["paper_total"] == 211e6
    assert "decoder" in run("info", DEFAULT_MODEL, cwd=tmp_path).stdout
    shown = run("doctor", cwd=tmp_path).stdout
    assert "onnxruntime" in shown
    findings = json.loads(run("doctor", "--json", cwd=tmp_path).stdout)
    assert {f["status"] for f in findings} <= {"ok", "missing"}
    assert all(f"{f['name']}: {f['fix']}" in shown.splitlines() for f in findings if f["fix"])


@pytest.mark.parametrize("arguments", [("doctor",), ("info", GPU_MODEL), ("verify", DEFAULT_MODEL)])
def test_narrow_tables_leave_nothing_out(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = run(*arguments, cwd=tmp_path, columns=50)
    assert "\N{HORIZONTAL ELLIPSIS}" not in done.stdout
    lines = [line for line in done.stdout.splitlines() if "pip install" not in line]
    assert max(map(len, lines)) <= 50  # but commands are whole, to be copied


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [("doctor", "--json"), ("info", DEFAULT_MODEL, "--json")])
def test_a_full_stdout_is_one_line(arguments: tuple[str, ...]) -> None:
    """Little output meets it only when the buffer is flushed."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, timeout=120,
            check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*No space left on device.*\n", done.stderr)


@pytest.mark.skipif(sys.platform == "win32", reason="a directory in use stays there")
def test_a_current_directory_that_is_gone_is_said_to_be(tmp_path: Path) -> None:
    """Another program's clean-up may take it from under a shell; the disk is not full then."""
    gone = tmp_path / "gone"
    gone.mkdir()
    code = (
        "import os, sys; from canvasmar_rt.cli import main; os.rmdir(os.getcwd()); "
        f"sys.argv = ['canvasmar-rt', 'predict', {str(DEMO_CLIP)!r}, '-o', 'o.mp4']; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=gone, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*the current directory is gone: cd to another\n", done.stderr)


@pytest.mark.parametrize("arguments", [("doctor", "--json"), ("info", DEFAULT_MODEL, "--json")])
def test_a_reader_that_goes_away_is_no_error_to_tell(arguments: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        done = subprocess.run(
            [*COMMAND, *arguments], stdout=pipe, stderr=subprocess.PIPE, text=True, timeout=120,
            check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "")


def test_bench_says_that_there_are_more_threads_than_cores(tmp_path: Path) -> None:
    """It would be many times slower without a word."""
    done = run("bench", "--threads", "1024", "--profile", "none", cwd=tmp_path, code=2)
    assert done.stderr.startswith(f"note: 1024 threads share {os.cpu_count()} cores")
    done = run("bench", "--threads", "1", "--profile", "none", cwd=tmp_path, code=2)
    assert done.stderr.startswith("error: ")


def test_bench_says_first_that_it_cannot_draw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(cli, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        cli.app(["bench", "--plot", str(tmp_path / "figures")], standalone_mode=False)


def test_bench_shows_its_table_before_it_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pictures(measured: object) -> dict[str, bytes]:
        raise ConfigError("no picture")

    monkeypatch.setattr("canvasmar_rt.benchmarks.report.pictures", pictures)
    arguments = ["--iterations", "1", "--warmup", "0", "--frames", "1", "--threads", "1"]
    with pytest.raises(ConfigError, match="no picture"):
        cli.app(["bench", *arguments, "--plot", str(tmp_path)], standalone_mode=False)
    assert "latent frames" in " ".join(capsys.readouterr().out.split())


def test_a_quantized_bundle_is_said_to_be_so(tmp_path: Path) -> None:
    assert "weights float16, products int8, " in run("info", "toytable-int8", cwd=tmp_path).stdout
    assert "int8" not in run("info", "toytable", cwd=tmp_path).stdout
    found = json.loads(run("doctor", "--json", cwd=tmp_path).stdout)
    details = {f["name"]: f["detail"] for f in found}
    assert details["bundle toytable-int8"].endswith("; float32, products int8")
    assert details["bundle toytable"].endswith("; float32")


@pytest.mark.parametrize("name", ["A.MP4", "A.Gif", "A.PNG"])
def test_a_suffix_may_be_of_any_case(name: str, tmp_path: Path) -> None:
    run("predict", DEMO_CLIP, "-o", name, "--frames", 2, cwd=tmp_path)
    assert (tmp_path / "A_sheet.png").is_file()
    made = tmp_path / "A" if name == "A.PNG" else tmp_path / name
    assert read_clip(made).frames.shape[0] == 5 + 2


def test_bench_measures_and_draws(tmp_path: Path) -> None:
    run("bench", "--batch", "1,2", "--baseline", "eager", "--iterations", 1, "--warmup", 0,
        "--frames", 1, "--json", "b.json", "--csv", "b.csv", "--plot", "figures",
        cwd=tmp_path)  # fmt: skip
    bench = json.loads((tmp_path / "b.json").read_text())
    assert [m["batch"] for m in bench["metrics"]] == [1, 2]
    for m in bench["metrics"]:
        assert m["contestants"]["ours"]["frame_ms"]["p50"] > 0
        assert m["over_ours"]["eager"]["clip"]["median"] > 0
    made = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*")}
    assert {"b.csv", "figures/first_frame.png", "figures/components.png"} <= made
    assert "naive-onnx" in run("bench", "--baseline", "list", cwd=tmp_path).stdout
    refused = run("bench", "--json", "b.json", "--csv", "./b.json", cwd=tmp_path, code=2)
    assert "two files" in refused.stderr
    assert json.loads((tmp_path / "b.json").read_text()) == bench


def test_a_dry_build_says_what_it_would_do(tmp_path: Path) -> None:
    """Needs no TensorRT."""
    arguments = ["build", GPU_MODEL, "--engine-dir", "engines", "--dry-run"]
    report = json.loads(run(*arguments, "--json", cwd=tmp_path).stdout)
    named = {part["component"]: part["action"] for part in report["components"]}
    assert set(named) == set(Bundle.open(GPU_MODEL).manifest.components)
    assert set(named.values()) == {"would build"}
    assert "would build" in run(*arguments, cwd=tmp_path).stdout
    refused = run("build", DEFAULT_MODEL, *arguments[2:], cwd=tmp_path, code=2)
    assert "int8 bundles run on the CPU only" in refused.stderr
    assert not list(tmp_path.iterdir())


def test_engine_options_reach_the_engine(tmp_path: Path) -> None:
    predict = ["predict", DEMO_CLIP, "-o", "x.mp4", "--frames", 2]
    run(*predict, "--engine", "torch", "--engine-option", "cuda_graph=false", cwd=tmp_path)
    for option, message in (
        ("cuda_grap=false", "no option cuda_grap; its options are .*cuda_graph"),
        ("cuda_graph=maybe", "cuda_graph must be true or false, got 'maybe'"),
        ("cuda_graph", "NAME=VALUE"),
        ("threads=2", "has an option of its own, --threads"),
    ):
        done = run(*predict, "--engine-option", option, cwd=tmp_path, code=2)
        assert re.search(message, done.stderr), done.stderr


def test_a_tampered_bundle_is_refused(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(PACKAGED / DEFAULT_MODEL, copy)
    weights = copy / "flow" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    done = run("predict", DEMO_CLIP, "-o", "x.mp4", "--model", copy, cwd=tmp_path, code=2)
    assert "flow/model.safetensors does not match its sha256" in done.stderr


def _hear() -> None:
    """A test run in the background of a shell, or under nohup, ignores signals, and children
    inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, how: signal.Signals) -> None:
    process = subprocess.Popen(
        [*COMMAND, "predict", str(DEMO_CLIP), "-o", "x.mp4", "--frames", "100000"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=_hear,
    )  # fmt: skip
    try:
        time.sleep(3)
        assert process.poll() is None
        process.send_signal(how)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())


def test_a_clip_is_never_overwritten_by_its_future(tmp_path: Path) -> None:
    run("demo", "-o", "clip.mp4", "--quiet", cwd=tmp_path)
    before = (tmp_path / "clip.mp4").read_bytes()
    done = run("predict", "clip.mp4", "-o", "clip.mp4", cwd=tmp_path, code=2)
    assert "is the clip itself" in done.stderr
    assert (tmp_path / "clip.mp4").read_bytes() == before


def test_clips_of_one_name_do_not_overwrite_each_other(tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    shutil.copy(DEMO_CLIP, folder / "a.npz")
    run("demo", "-o", folder / "a.mp4", "--quiet", cwd=tmp_path)
    (folder / "a_sheet.png").unlink()
    run("predict", folder, "-o", "out", "--frames", 2, "--quiet", cwd=tmp_path)
    assert {p.name for p in (tmp_path / "out").glob("*.mp4")} == {"a.npz.mp4", "a.mp4.mp4"}


def test_a_name_is_printed_as_it_is(tmp_path: Path) -> None:
    copy = tmp_path / "br[/x]:fire:"
    shutil.copytree(PACKAGED / GPU_MODEL, copy)
    assert "br[/x]:fire:" in run("info", copy, cwd=tmp_path).stdout
    run("build", copy, "--engine-dir", copy / "engines", "--dry-run", cwd=tmp_path)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_serve_answers_until_it_is_told_to_end(tmp_path: Path, how: signal.Signals) -> None:
    process = subprocess.Popen(
        [*COMMAND, "serve", "--port", "0", "--slots", "1"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=_hear,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[0]
        with urllib.request.urlopen(f"{url}healthz", timeout=10) as answer:
            assert json.load(answer) == {"status": "ok"}
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert b"<canvas" in answer.read()
        process.send_signal(how)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
