"""A loop at fixed ticks: what counts as missed, and that its figures say what happened."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import canvasmar_rt
from canvasmar_rt.benchmarks import latency, soak
from canvasmar_rt.benchmarks.soak import SKIPPED, Tick, busy, picture, run_ticks, summary
from canvasmar_rt.bundle import Bundle
from canvasmar_rt.deadline import Rung, ladder
from canvasmar_rt.errors import ConfigError, EngineError


class Sleeper:
    """Frames that take known times; notes the budgets it was given."""

    config = SimpleNamespace(action_dim=0)

    def __init__(self, *seconds: float) -> None:
        self._seconds = list(seconds)
        self.budgets: list[float] = []

    def step(self, action: object, *, budget_ms: float) -> Any:
        self.budgets.append(budget_ms)
        time.sleep(self._seconds.pop(0))
        return SimpleNamespace(ar_steps=2, flow_steps=3, guided=True)


def test_a_frame_that_overruns_takes_from_the_next() -> None:
    rollout = Sleeper(0.0, 0.3, 0.0, 0.0)
    ticks = run_ticks(rollout, count=4, period=0.2, budget=0.2)  # type: ignore[arg-type]
    assert [t.met for t in ticks] == [True, False, True, True]
    assert rollout.budgets[2] < 120 < rollout.budgets[3]


def test_a_tick_whose_time_has_passed_is_skipped_and_missed() -> None:
    rollout = Sleeper(0.5, 0.0, 0.0)
    ticks = run_ticks(rollout, count=4, period=0.2, budget=0.2)  # type: ignore[arg-type]
    assert [t.drawn for t in ticks] == ["2x3", SKIPPED, "2x3", "2x3"]
    assert [t.met for t in ticks] == [False, False, True, True]


def test_the_figures_of_a_phase() -> None:
    ticks = [Tick(0.01, "2x3", True)] * 6 + [Tick(0.02, "canvas", True), Tick(0.06, SKIPPED, False)]
    found = summary(ticks, (100_000_000, 101_000_000))
    assert (found["ticks"], found["missed"], found["missed_share"]) == (8, 1, 0.125)
    assert found["drawn"] == {"2x3": 6, "canvas": 1, SKIPPED: 1}
    assert found["tick_to_frame_ms"]["p50"] == 10.0  # a skipped tick has no frame
    assert found["growth"] == 0.01
    image = Image.open(io.BytesIO(picture({"alone": ticks, "busy": ticks}, 0.05, "t", "u")))
    assert image.format == "PNG"


def test_the_committed_soaks_are_of_the_packaged_model() -> None:
    """On the rungs that it has; the pages quote them."""
    results = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
    loop, service = (
        json.loads((results / f"{name}_cpu.json").read_text())
        for name in ("soak_toytable_int8", "service_soak")
    )
    rungs = ladder(canvasmar_rt.load("toytable-int8", threads=1).sampling)
    measured = [(r["ar_steps"], r["flow_steps"]) for r in loop["latency_at_warmup"]]
    assert measured == [(r.ar_steps, r.flow_steps) for r in rungs] + [(0, 0)]
    drawn = {int(steps) for reader in service["readers"] for steps in reader["ar_steps"]}
    assert drawn <= {r.ar_steps for r in rungs} | {0}
    page = (results.parents[1] / "docs" / "service.md").read_text()
    memory = service["resident_mb_at_start"], service["resident_mb_at_end"]
    assert "memory went from {} to {} MB".format(*memory) in page
    page = (results.parents[1] / "docs" / "runtime.md").read_text()
    missed = [phase["missed"] for phase in loop["phases"].values()]
    assert "{} and {} of 12,000 ticks missed".format(*missed) in page


def test_busy_processes_end_with_the_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[subprocess.Popen[bytes]] = []

    def start(*args: Any) -> subprocess.Popen[bytes]:
        made.append(original(*args))
        return made[-1]

    original = subprocess.Popen
    monkeypatch.setattr(soak.subprocess, "Popen", start)

    def interrupted() -> None:
        with busy(2):
            assert [process.poll() for process in made] == [None, None]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(process.returncode for process in made)


def test_busy_processes_end_with_a_process_that_is_killed() -> None:
    code = """import os
from canvasmar_rt.benchmarks.soak import busy
with busy(2):
    os.kill(os.getpid(), 9)"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    parent.communicate(timeout=60)  # its children hold the pipe as long as they live
    assert parent.returncode == -9


def test_the_command_writes_its_figures(bundles: Callable[[str], Bundle], tmp_path: Path) -> None:
    output, plot = tmp_path / "soak.json", tmp_path / "soak.png"
    done = CliRunner().invoke(
        soak.app,
        [str(bundles("expert").path), "--hz", "50", "--seconds", "0.5", "--budget-ms", "200",
         "--load", "1", "--json", str(output), "--plot", str(plot), "--quiet"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    report = json.loads(output.read_text())
    assert list(report["phases"]) == ["alone", "beside 1 busy processes"]
    for found in report["phases"].values():
        assert found["ticks"] == 25
        assert sum(found["drawn"].values()) == 25
    assert report["latency_at_warmup"][-1]["ar_steps"] == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "ticks missed" in done.output


def test_every_rung_is_shown() -> None:
    predictor = canvasmar_rt.load("toytable-int8", threads=1)
    sheet = soak.rungs_sheet(predictor, latent_frames=1)
    assert sheet.dtype == np.uint8
    names = [soak.rung_name(Rung(k, e, g, 0.0, 0.0)) for k, e, g in ((2, 3, True), (1, 3, False))]
    assert names == ["2x3", "1x3, unguided"]
    assert sheet.shape[0] > 5 * 64  # the real frame, and four rungs
    assert sheet.shape[1] < 4 * sheet.shape[0]


def test_memory_that_cannot_be_read_is_told_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "_status", lambda field: None)
    refused = CliRunner().invoke(soak.app, ["none"])
    assert isinstance(refused.exception, EngineError)


def test_a_loop_needs_ticks() -> None:
    for arguments in (
        ["--hz", "0"],
        ["--budget-ms", "inf"],
        ["--seconds", "2", "--budget-ms", "2001"],
    ):
        refused = CliRunner().invoke(soak.app, arguments)
        assert isinstance(refused.exception, ConfigError)
