"""The command that runs everything on a GPU, tried out on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from canvasmar_rt.benchmarks import gpu
from canvasmar_rt.errors import EngineError


def test_every_part_leaves_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # without the test suite
    monkeypatch.setattr(gpu, "CASE_SECONDS", 1.0)
    monkeypatch.setattr(gpu, "ITERATIONS", 3)
    output = tmp_path / "gpu.json"
    said: list[str] = []
    cases = tuple(
        gpu.Case(model="toytable", mode=mode, dtype="float32") for mode in ("eager", "cuda graph")
    )
    report = gpu.run("cpu", output, limit=600, cases=cases, soak_frames=10, say=said.append)
    assert json.loads(output.read_text()) == json.loads(json.dumps(report))
    by_engine = {found["engine"]: found for found in report["parity"]}
    assert max(by_engine["torch"]["drift"]) < 1e-3
    assert "runs on cuda" in by_engine["tensorrt"]["error"]
    for mode in ("eager", "cuda graph"):
        found = report[f"toytable, {mode}, batch 1"]
        assert 0 < found["frame_ms"]["p50"] <= found["frame_ms"]["p99"]
        assert found["frames"] >= 3
    by_engine = {found.get("engine") or found["config"]["contestants"]["ours"]["engine"]: found
                 for found in report["engines, toytable"]}  # fmt: skip
    for engine in ("onnxruntime", "torch"):
        ours = by_engine[engine]["metrics"][0]["contestants"]["ours"]
        assert ours["frame_ms"]["p50"] > 0
    assert "runs on cuda" in by_engine["tensorrt"]["error"]
    assert report["soak"]["frames"] == 10
    assert report["soak"]["memory_at_end"]["host_bytes"] > 0
    assert "checkout" in report["tests"]["skipped"]
    assert len(said) >= 4


def test_what_no_longer_fits_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu, "parity", lambda device, left: [])
    report = gpu.run("cpu", tmp_path / "gpu.json", limit=5, soak_frames=10)
    skipped = [name for name, found in report.items() if "skipped" in found]
    assert len(skipped) == len(gpu.CASES) + 4
    some = gpu.run("cpu", tmp_path / "gpu.json", limit=5, only=("parity", "bair"))
    of_bair = [c for c in gpu.CASES if c.model == "bair"]
    assert [name for name in some if name.startswith("bair")] == list(some)[4:]
    assert len(some) == 4 + len(of_bair)


def test_a_part_that_fails_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def broken(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu, "parity", lambda device, left: [])
    monkeypatch.setattr(gpu, "latency", broken)
    monkeypatch.setattr(gpu, "engines", broken)
    monkeypatch.setattr(gpu, "soak", lambda *_, **__: {"frames": 1})
    report = gpu.run("cpu", tmp_path / "gpu.json", limit=60, cases=gpu.CASES[:1])
    assert "out of memory" in report["kinetics600, eager, batch 1"]["error"]
    assert report["soak"] == {"frames": 1}


def test_another_gpu_is_the_one_for_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    current: list[torch.device] = []
    built: list[str] = []
    monkeypatch.setattr(gpu, "torch_device", torch.device)
    monkeypatch.setattr(gpu, "describe", lambda device: {})
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(gpu, "build_engines", lambda *_, device: built.append(device))
    gpu.run("cuda:1", tmp_path / "gpu.json", limit=60, only=("parity",))
    assert current == [torch.device("cuda:1")]
    assert built == ["cuda:1"]


@pytest.mark.parametrize("hangs", [False, True])
def test_tests_that_are_stopped_leave_what_they_found(
    hangs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  gpu\n  tensorrt\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_some.py").write_text(
        "import time, pytest\npytestmark = pytest.mark.gpu\n"
        "def test_good(): pass\ndef test_bad(): assert False, 'why'\n"
        f"def test_slow(): time.sleep({600 if hangs else 0})\n"
    )
    monkeypatch.chdir(tmp_path)
    found = gpu.gpu_tests(seconds=25 if hangs else 300)
    assert found["passed"] == (1 if hangs else 2)
    assert found["failed"] == 1
    assert found["did_not_pass"] == ["tests/test_some.py::test_bad"]
    assert "test_bad" in found["output"]
    assert found.get("stopped_after_seconds") == (25 if hangs else None)
    assert found.get("exit_status") == (None if hangs else 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="doctor"):
        gpu.run("cuda", tmp_path / "gpu.json", limit=10)
