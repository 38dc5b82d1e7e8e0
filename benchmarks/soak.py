"""A control loop held to its ticks for minutes: on this machine alone, then beside busy processes.

python -m canvasmar_rt.benchmarks.soak --hz 20 --seconds 600 --load 2 --json F --plot P
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

import canvasmar_rt
from canvasmar_rt.benchmarks.latency import machine, moving_clip, percentiles, resident_bytes
from canvasmar_rt.benchmarks.report import COLOURS, check_matplotlib, figure_of, png
from canvasmar_rt.bundle import DEMO_CLIP
from canvasmar_rt.command import run_command, stderr_bar
from canvasmar_rt.contact_sheet import contact_sheet
from canvasmar_rt.deadline import Rung
from canvasmar_rt.engines.program import UInt8
from canvasmar_rt.errors import ConfigError
from canvasmar_rt.files import check_writable, write_file
from canvasmar_rt.predict import context_length, read_latent_actions
from canvasmar_rt.rollout import Prediction, Predictor, Rollout
from canvasmar_rt.video import read_clip, write_png

CANVAS = "canvas"
SKIPPED = "skipped"
CONTEXT_FRAMES = 5
BUSY = """import os, sys
while os.getppid() == int(sys.argv[1]):  # a parent that was killed cannot end it
    for _ in range(100_000): pass"""


@dataclasses.dataclass(frozen=True)
class Tick:
    """What became of a tick: seconds from it to the frame, how that was drawn, whether in time.
    A tick that had passed before its turn came is skipped, and missed."""

    seconds: float
    drawn: str
    met: bool


def run_ticks(
    rollout: Rollout,
    *,
    count: int,
    period: float,
    budget: float,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Tick]:
    """Run a loop at fixed ticks, `period` and `budget` in seconds. The budget counts from the tick,
    so that what an earlier frame overran is taken from the next one's."""
    rng = np.random.default_rng(seed)
    size = rollout.config.action_dim
    ticks = []
    begun = time.perf_counter()
    for i in range(count):
        tick = begun + i * period
        now = time.perf_counter()
        if now < tick:
            time.sleep(tick - now)
            now = time.perf_counter()
        left = tick + budget - now
        if left <= 0:
            ticks.append(Tick(now - tick, SKIPPED, False))
            continue
        action = rng.uniform(-0.02, 0.02, size).astype(np.float32) if size else None
        made = rollout.step(action, budget_ms=1e3 * left)
        seconds = time.perf_counter() - tick
        ticks.append(Tick(seconds, rung_name(made), seconds <= budget))
        progress(i + 1)
    return ticks


def summary(ticks: Sequence[Tick], resident: tuple[int, int]) -> dict[str, Any]:
    """Figures of a phase; `resident` are bytes after its first tenth and at its end."""
    missed = sum(not tick.met for tick in ticks)
    return {
        "ticks": len(ticks),
        "missed": missed,
        "missed_share": round(missed / len(ticks), 5),
        "tick_to_frame_ms": percentiles([t.seconds for t in ticks if t.drawn != SKIPPED]),
        "drawn": dict(collections.Counter(t.drawn for t in ticks).most_common()),
        "resident_mb": [round(b / 1e6, 2) for b in resident],
        "growth": round(resident[1] / resident[0] - 1.0, 5),
    }


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that compute for nothing."""
    command = [sys.executable, "-c", BUSY, str(os.getpid())]
    processes = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def soak(
    rollout: Rollout,
    *,
    count: int,
    period: float,
    budget: float,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[Tick], dict[str, Any]]:
    """A phase of `count` ticks and its figures."""
    first = max(1, count // 10)

    def run(ticks: int, done: int) -> list[Tick]:
        return run_ticks(
            rollout,
            count=ticks,
            period=period,
            budget=budget,
            seed=done,
            progress=lambda i: progress(done + i),
        )

    early = run(first, 0)
    after_first = resident_bytes()
    ticks = early + run(count - first, first)
    return ticks, summary(ticks, (after_first, resident_bytes()))


def picture(phases: Mapping[str, Sequence[Tick]], budget: float, title: str, under: str) -> bytes:
    """PNG: milliseconds from tick to frame, by tick, coloured by how the frame was drawn."""
    figure, axes = figure_of(title, under)
    start = 0
    kinds = list(dict.fromkeys(t.drawn for ticks in phases.values() for t in ticks))
    for name, ticks in phases.items():
        for kind, colour in zip(kinds, COLOURS[1:], strict=False):
            chosen = [(start + i, 1e3 * t.seconds) for i, t in enumerate(ticks) if t.drawn == kind]
            x, y = zip(*chosen, strict=True) if chosen else ((), ())
            label = kind if start == 0 else None
            axes.scatter(x, y, s=2, color=colour, label=label, linewidths=0, rasterized=True)
        axes.text(start, 1.0, f" {name}", transform=axes.get_xaxis_transform(), va="top")
        start += len(ticks)
        axes.axvline(start, color="#999999", linewidth=0.8)
    axes.axhline(1e3 * budget, color="black", linewidth=1.0, linestyle="--")
    axes.set_ylim(0, 2e3 * budget)
    axes.set_xlabel("tick")
    axes.set_ylabel("ms from tick to frame")
    axes.legend(frameon=False, title="AR x flow steps", markerscale=4, loc="upper right")
    return png(figure)


def rung_name(drawn: Rung | Prediction) -> str:
    """How a frame is or was drawn, in few words."""
    if not drawn.ar_steps:
        return CANVAS
    return f"{drawn.ar_steps}x{drawn.flow_steps}" + ("" if drawn.guided else ", unguided")


def rungs_sheet(predictor: Predictor, latent_frames: int = 8) -> UInt8:
    """Contact sheet: how the packaged clip goes on, and what every rung makes of it when all frames
    are drawn on it. Needs a model that takes the clip's actions."""
    config = predictor.config
    ae, t = config.autoencoder, config.autoencoder.temporal_compression
    length = context_length(config, CONTEXT_FRAMES)
    known = (length - 1) // t
    clip = read_clip(
        DEMO_CLIP,
        size=(ae.height, ae.width),
        fps=config.fps,
        min_frames=length + latent_frames * t,
    ).frames
    actions = read_latent_actions(DEMO_CLIP, config, known + latent_frames).latent
    rollout = predictor.start(clip[:length], actions=actions[:known])
    actions = actions[known : known + latent_frames]
    rollout.warmup(deadlines=True)
    rows = [("real", [clip[length - 1 + t * (i + 1)] for i in range(latent_frames)])]
    for level, rung in enumerate(rollout.latency):
        rollout.reset()
        drawn = [rollout._step(action, level=level).frames[0, -1] for action in actions]
        rows.append((rung_name(rung), drawn))
    return contact_sheet(rows)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
stdout = Console(emoji=False)


@app.command()
def main(
    model: Annotated[str, typer.Argument(help="A bundle, or a packaged name.")] = "toytable-int8",
    engine: Annotated[str, typer.Option(help="onnxruntime, torch or tensorrt.")] = "onnxruntime",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:<index>.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads of the engine.")] = None,
    hz: Annotated[float, typer.Option(help="Ticks a second.")] = 20.0,
    budget_ms: Annotated[
        float | None, typer.Option(help="From tick to frame; as long as a tick if not given.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Length of a phase.")] = 600.0,
    load: Annotated[
        int, typer.Option(min=0, help="Busy processes beside a second phase; 0: no such phase.")
    ] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Videos at once.")] = 1,
    output: Annotated[Path | None, typer.Option("--json", help="JSON to write.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG to write.")] = None,
    sheet: Annotated[
        Path | None, typer.Option(help="PNG to write: the packaged clip drawn on every rung.")
    ] = None,
    quiet: Annotated[bool, typer.Option(help="No bar.")] = False,
) -> None:
    """Hold a loop to its ticks with `step(budget_ms=...)`; ticks missed, what was drawn, memory."""
    period = 1.0 / hz if hz > 0 else 0.0
    budget = period if budget_ms is None else budget_ms / 1e3
    if not (math.isfinite(seconds * hz) and period > 0 and budget > 0 and seconds * hz >= 20):
        raise ConfigError("soak: need --hz and --budget-ms above 0 and at least 20 ticks")
    if budget > seconds:  # neither JSON nor a picture takes an infinite one
        raise ConfigError(f"soak: --budget-ms {budget_ms:g} is longer than the {seconds:g} seconds")
    resident_bytes()  # where it cannot be had, that is told before the first phase
    count = int(seconds * hz)
    for path in (output, plot, sheet):
        if path is not None:
            check_writable(path)
    if plot is not None:
        check_matplotlib()
    predictor = canvasmar_rt.load(model, engine=engine, device=device, threads=threads)
    if sheet is not None:
        write_png(sheet, rungs_sheet(predictor))
    latent_frames = max(2, predictor.config.context_frames // 2)
    rollout = predictor.start(moving_clip(predictor.config, latent_frames), batch=batch)
    rollout.warmup(deadlines=True)
    report: dict[str, Any] = {
        "config": {
            "model": predictor.config.name, "engine": engine, "device": device,
            "threads": threads, "batch": batch, "hz": hz, "budget_ms": 1e3 * budget,
            "seconds": seconds, "load": load,
        },
        "metadata": machine(),
        "latency_at_warmup": [dataclasses.asdict(rung) for rung in rollout.latency],
        "phases": {},
    }  # fmt: skip
    phases = {"alone": 0} | ({f"beside {load} busy processes": load} if load else {})
    ticks: dict[str, list[Tick]] = {}
    with stderr_bar(quiet) as bar:
        for name, processes in phases.items():
            task = bar.add_task(name, total=count)
            with busy(processes):
                ticks[name], report["phases"][name] = soak(
                    rollout, count=count, period=period, budget=budget,
                    progress=lambda done, task=task: bar.update(task, completed=done),  # type: ignore[misc]
                )  # fmt: skip
    if output is not None:
        write_file(output, json.dumps(report, indent=1) + "\n")
    if plot is not None:
        title = f"{hz:g} Hz, a budget of {1e3 * budget:g} ms"
        under = f"{predictor.config.name}, {engine} on {report['metadata']['cpu']}"
        write_file(plot, picture(ticks, budget, title, under))
    for name, found in report["phases"].items():
        stdout.print(
            f"{name}: {found['missed']} of {found['ticks']} ticks missed "
            f"({found['missed_share']:.2%}), p50 {found['tick_to_frame_ms']['p50']:.1f} ms, p99 "
            f"{found['tick_to_frame_ms']['p99']:.1f} ms, drawn {found['drawn']}, memory "
            f"{found['growth']:+.2%}",
            highlight=False, markup=False,
        )  # fmt: skip


if __name__ == "__main__":
    run_command(app)
