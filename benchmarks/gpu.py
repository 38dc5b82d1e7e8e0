"""Everything that needs a GPU, in one command and under nine minutes:

    python -m canvasmar_rt.benchmarks.gpu --output results.json

Parts run in order of worth, each in what is left of the time; the JSON is rewritten after each one,
so that a machine that goes away leaves what was measured. `--device cpu` runs the same code without
a GPU, to see that it works; its figures mean nothing.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer

import canvasmar_rt
from canvasmar_rt.command import print_error, run_command, stderr
from canvasmar_rt.errors import EngineError

try:
    import torch
except ImportError:
    print_error(EngineError('the GPU benchmarks need PyTorch: pip install "canvasmar-rt[export]"'))
    sys.exit(2)

from torch import Tensor

from canvasmar_rt.benchmarks.latency import (
    BenchOptions,
    bench,
    machine,
    percentiles,
    resident_bytes,
)
from canvasmar_rt.bundle import Bundle
from canvasmar_rt.config import SamplingConfig, preset
from canvasmar_rt.engines.base import ENGINES, cuda_index
from canvasmar_rt.engines.program import Clock, NoiseAhead, NoiseKey
from canvasmar_rt.engines.tensorrt_build import OPTIONAL, BuildOptions, build_engines
from canvasmar_rt.engines.torch_engine import compiled_graphs, torch_device
from canvasmar_rt.engines.torch_program import TorchProgram
from canvasmar_rt.export.exporter import ExportOptions, export_bundle
from canvasmar_rt.files import check_writable, write_file
from canvasmar_rt.models import sampler
from canvasmar_rt.models.canvasmar import FrameModel
from canvasmar_rt.models.families import build, cast
from canvasmar_rt.models.graphs import Graph, graph
from canvasmar_rt.schedule import branch_inputs, set_sizes, solver_inputs
from canvasmar_rt.verify import verify

MODES = (
    "eager", "cuda graph", "cuda graph, flow kernel", "cuda graph, persistent flow kernel",
    "compile", "compile + cuda graph", "compile + cuda graph, flow kernel",
)  # fmt: skip
"""Ways to run a frame in PyTorch; eager is the reference sampler, as a researcher writes it."""

CASE_SECONDS = 6.0
ITERATIONS = 50

FLOW_KERNELS: dict[str, Literal["staged", "persistent"]] = {
    "cuda graph, flow kernel": "staged",
    "cuda graph, persistent flow kernel": "persistent",
    "compile + cuda graph, flow kernel": "staged",
}

Report = dict[str, Any]
Say = Callable[[str], None]
Left = Callable[[], float]
"""Seconds that are left."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One latency measurement. `guided` is full guidance (three branches) or none (one)."""

    model: str
    mode: str
    batch: int = 1
    guided: bool = True
    dtype: str = "bfloat16"


CASES = (
    *(Case(model="kinetics600", mode=m) for m in ("eager", "cuda graph")),
    *(Case(model="bair", mode=m) for m in MODES[:4]),
    *(Case(model="kinetics600", mode=m) for m in MODES[2:4]),
    Case(model="kinetics600", mode="cuda graph", guided=False),
    Case(model="kinetics600", mode="cuda graph", batch=32),
    *(Case(model="toytable", mode=m, dtype="float32") for m in ("eager", "cuda graph")),
    Case(model="bair", mode="cuda graph", batch=32),
    *(
        Case(model=name, mode=mode)
        for mode in reversed(MODES[5:])
        for name in ("kinetics600", "bair")
    ),
    *(
        Case(model="toytable", mode=mode, dtype="float32")
        for mode in ("compile + cuda graph", "compile")
    ),
    Case(model="kinetics600", mode="compile"),
)


@functools.cache
def network(name: str, dtype: str, device: torch.device) -> FrameModel:
    """A preset with random weights, made once for all its cases: that takes ten seconds."""
    return cast(build(preset(name)[0], seed=0), getattr(torch, dtype)).to(device)


class Frames:
    """Latent frames of a model with random weights, one call each, under one of the modes."""

    def __init__(self, case: Case, device: torch.device, *, sampling: SamplingConfig) -> None:
        model = network(case.model, case.dtype, device)
        if "compile" in case.mode:  # which layers are is for other cases to see
            model = copy.deepcopy(model)
        self._model, self._sampling, self._batch = model, sampling, case.batch
        self._time = 0
        if case.mode == "eager":
            self._state = sampler.empty_state(model, case.batch)
            self.step = self._eager
            return
        captured = "cuda graph" in case.mode
        modules: dict[str, Graph] = {}
        if "compile" in case.mode:
            modules = compiled_graphs(model, captured=captured)

        def component(name: str) -> Graph:
            if name not in modules:
                modules[name] = graph(model, name)
            return modules[name]

        self._program = TorchProgram(
            model, component, name=case.mode, batch=case.batch, sampling=sampling,
            graphs=captured,
            flow_kernel=FLOW_KERNELS.get(case.mode),
        )  # fmt: skip
        self._program.warmup()
        self._noise = NoiseAhead(self._program.noise)
        self.step = self._programmed

    def _eager(self) -> None:
        config, device = self._model.config, self._model.device
        noise = sampler.draw_noise(
            config, self._sampling, seed=0, streams=range(self._batch), frame=self._time
        )
        moved = {k: v.to(device) for k, v in vars(noise).items()}
        self._state, sample = sampler.step(
            self._model, self._sampling, self._state, dataclasses.replace(noise, **moved)
        )
        sample.frames.cpu()
        self._time += 1

    def _programmed(self) -> None:
        key = NoiseKey(
            sampling=self._sampling, seed=0, streams=tuple(range(self._batch)),
            since=(0,) * self._batch, frame=self._time, has_canvas=self._model.config.canvas,
        )  # fmt: skip
        following = dataclasses.replace(key, frame=self._time + 1)
        self._noise.fill(key)
        self._program.predict(
            self._time, None, order=None, level=lambda: 0, on_canvas=None, clock=Clock(),
            meanwhile=lambda: self._noise.draw(following),
        )  # fmt: skip
        self._time += 1


def latency(case: Case, device: torch.device, *, seconds: float) -> Report:
    """Wall-clock time of latent frames, noise to pixels on the host, for about `seconds` from the
    first one on."""
    _, sampling = preset(case.model)
    if not case.guided:
        sampling = dataclasses.replace(sampling, temporal_guidance=1.0, canvas_guidance=1.0)
    begun = time.perf_counter()
    frames = Frames(case, device, sampling=sampling)
    times: list[float] = []
    while len(times) < 3 or (len(times) < 300 and sum(times) < seconds):
        started = time.perf_counter()
        frames.step()
        times.append(time.perf_counter() - started)
        if len(times) == 1:
            ready = time.perf_counter() - begun
    steady = times[len(times) // 4 :]
    return {
        **dataclasses.asdict(case),
        "sampling": dataclasses.asdict(sampling),
        "frames": len(steady),
        "ready_seconds": round(ready, 2),
        "first_frame_ms": round(1e3 * times[0], 3),
        "frame_ms": percentiles(steady),
        "per_video_ms": round(1e3 * float(np.median(steady)) / case.batch, 3),
    }


def parity(device: str, left: Left) -> list[Report]:
    """`verify` of the packaged bundle on every engine that this machine has on the device, as long
    as there is time left."""
    found: list[Report] = []
    with tempfile.TemporaryDirectory() as work:
        for engine in ENGINES:
            if left() < 0:
                found.append({"engine": engine, "device": device, "skipped": "no time left"})
                continue
            try:
                options = _needed("toytable", engine, device, Path(work))
                report = verify("toytable", engine=engine, device=device, **options)
                del report["bundle"]
                found.append(report)
            except Exception as error:  # of Triton or a compiler, too: the other engines go on
                found.append({"engine": engine, "device": device, "error": _told(error)})
    return found


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:2000]


def _needed(bundle: str | Path, engine: str, device: str, directory: Path) -> dict[str, Any]:
    """Options an engine does not run without: of TensorRT the engines' folder, built here, without
    the whole frame's, which takes longest and no loop uses."""
    if engine != "tensorrt" or device == "cpu":  # where it says that it does not run
        return {}
    opened = Bundle.open(bundle)
    names = tuple(name for name in opened.manifest.components if name != OPTIONAL)
    build_engines(opened, directory, BuildOptions(components=names), device=device)
    return {"engine_dir": directory}


def engines(bundle: str | Path, device: str, left: Left) -> list[Report]:
    """`canvasmar-rt bench` of a bundle on every engine, with and without CUDA graphs, as long as
    there is time left."""
    found: list[Report] = []
    with tempfile.TemporaryDirectory() as work:
        for engine, graphs in itertools.product(ENGINES, (True, False)):
            if left() < 0:
                found.append({"engine": engine, "cuda_graph": graphs, "skipped": "no time left"})
                continue
            try:
                options = {"cuda_graph": graphs} | _needed(bundle, engine, device, Path(work))
                predictor = canvasmar_rt.load(bundle, engine=engine, device=device, **options)
                report = bench(predictor, BenchOptions(iterations=ITERATIONS), {})
                found.append({"config": report["config"], "metrics": report["metrics"]})
            except Exception as error:  # of Triton or a compiler, too: the other engines go on
                found.append({"engine": engine, "cuda_graph": graphs, "error": _told(error)})
    return found


def exported(name: str, dtype: str, device: str, left: Left) -> list[Report]:
    """The same for a preset with random weights, exported without loops."""
    model, sampling = build(preset(name)[0], seed=0), preset(name)[1]
    options = ExportOptions(dtype=dtype, opset=23, unroll=True, drift_frames=1)
    with tempfile.TemporaryDirectory() as work:
        bundle = export_bundle(model, sampling, Path(work) / name, options, source="random weights")
        return engines(bundle.path, device, left)


TILES = (
    (64, 64, 4, 4), (32, 64, 4, 4), (16, 64, 4, 6), (32, 128, 4, 3), (16, 128, 4, 4),
    (16, 256, 4, 3), (64, 128, 8, 3),
)  # fmt: skip
"""Columns, depth, warps and loads ahead of the flow kernel's products that are tried."""


def flow_heads(device: torch.device, left: Left, names: Sequence[str]) -> list[Report]:
    """The flow head of a frame's smallest and largest set: microseconds an evaluation, by PyTorch
    and by the kernel with several tiles, and how far the kernel's tokens are from PyTorch's."""
    found: list[Report] = []
    for name in names:
        model, (config, sampling) = network(name, "bfloat16", device), preset(name)
        sizes = set_sizes(config.tokens, sampling.ar_steps)
        for tokens in sorted({min(sizes), max(sizes)}):
            found.append(
                {"model": name, "tokens": tokens} | _flow_head(model, tokens, sampling, left)
            )
    return found


def _flow_head(model: FrameModel, tokens: int, sampling: SamplingConfig, left: Left) -> Report:
    from canvasmar_rt.engines.flow_kernel import FlowKernel, Tiles, tiles

    config, device = model.config, model.device
    fixed = solver_inputs(sampling) | branch_inputs(sampling, has_canvas=config.canvas)
    t = {name: torch.from_numpy(x).to(device) for name, x in fixed.items()}
    evaluations, branches = len(t["flow_time"]), len(t["branch_weight"])
    draw = functools.partial(torch.randn, generator=torch.Generator(device).manual_seed(0))
    latent = (1, config.tokens, config.autoencoder.latent_channels)
    t["flow_noise"] = draw(latent, device=device)
    t["partial"] = torch.zeros(latent, device=device)
    t["select_index"] = torch.arange(tokens, device=device)[None]
    z = draw((branches, 1, tokens, config.dim), device=device)
    t["z_tokens"] = z.to(model.dtype)
    module, rows = graph(model, "flow"), branches * tokens

    make = functools.partial(
        FlowKernel, model.flow, tokens=tokens, branches=branches, evaluations=evaluations,
        residual=config.residual,
    )  # fmt: skip
    staged, persistent = make(mode="staged"), make(mode="persistent")
    ways: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: module(*(t[s.name] for s in module.component.inputs))[0],
        "persistent": lambda: persistent.component(t),
        "staged": lambda: staged.component(t),
    }
    tall = tiles(rows, config.flow.width, model.dtype).rows
    for columns, depth, warps, loads in TILES:
        using = Tiles(rows=tall, columns=columns, depth=depth, warps=warps, stages=loads)
        ways[f"staged, {columns} x {depth}, {warps} warps, {loads} ahead"] = functools.partial(
            staged.component, t, using=using
        )
    spent: dict[str, float] = {}
    differs: dict[str, float] = {}
    want: Tensor | None = None
    report: Report = {"rows": rows, "us_an_evaluation": spent, "difference": differs}
    for name, way in ways.items():
        if left() < 0:
            return report | {"skipped": "no time left for the others"}
        try:
            seconds, drawn = _replayed(way, device)
        except Exception as error:  # of Triton's compiler, too: other tiles go on
            report.setdefault("errors", {})[name] = _told(error)
            continue
        want = drawn if want is None else want
        spent[name] = round(1e6 * seconds / evaluations, 2)
        differs[name] = float((drawn - want).norm() / want.norm())
    return report


def _replayed(work: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    """Seconds of a call, the median of some, on CUDA as a captured graph; and what it made."""
    on_gpu = device.type == "cuda"
    times = []
    with torch.inference_mode():
        made = work().clone()
        again: Callable[[], object] = work
        if on_gpu:
            recorded = torch.cuda.CUDAGraph()
            with torch.cuda.device(device), torch.cuda.graph(recorded):
                work()
            again = recorded.replay
        for _ in range(20 if on_gpu else 1):
            started = time.perf_counter()
            again()
            if on_gpu:
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - started)
    return float(np.median(times)), made


def soak(device: str, *, frames: int, seconds: float) -> Report:
    """The packaged model frame after frame: memory at a tenth and at the end, and the jitter."""
    predictor = canvasmar_rt.load("toytable", engine="torch", device=device)
    rollout = predictor.start(seed=0)
    rollout.warmup()
    begun, early = time.perf_counter(), dict[str, int]()
    times: list[float] = []
    for i in range(frames):
        started = time.perf_counter()
        rollout.step()
        times.append(time.perf_counter() - started)
        if i == frames // 10:
            early = _memory(device)
        if time.perf_counter() - begun > seconds:
            break
    shown = percentiles(times[len(times) // 10 :])
    return {
        "frames": len(times),
        "memory_at_a_tenth": early,
        "memory_at_end": _memory(device),
        "frame_ms": shown,
        "p99_over_p50": round(shown["p99"] / shown["p50"], 3),
    }


def _memory(device: str) -> dict[str, int]:
    out = {"host_bytes": resident_bytes()}
    if device != "cpu":
        free, total = torch.cuda.mem_get_info(cuda_index("torch", device))
        out["device_bytes"] = total - free
    return out


def gpu_tests(*, seconds: float) -> Report:
    """The test suite's GPU tests, if the tests are at hand."""
    if not Path("tests").is_dir():
        return {"skipped": "no tests/ here: run this from a checkout"}
    with tempfile.TemporaryFile("w+") as log:
        # files that want packages this machine lacks are counted as errors and stop nothing; a
        # benchmark plugin would warn of the workers, and warnings are errors
        command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu or tensorrt", "-n", "8",
                   "-p", "no:benchmark", "--continue-on-collection-errors"]  # fmt: skip
        report: Report = {}
        try:
            done = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, timeout=max(seconds, 1), check=False
            )
            report["exit_status"] = done.returncode
        except subprocess.TimeoutExpired:
            report["stopped_after_seconds"] = round(seconds)
        log.seek(0)
        return report | _outcomes(log.read())


def _outcomes(log: str) -> Report:
    """How the tests in the output of `pytest -v -n` went, so far as it got; the names of those that
    did not pass; and, if there are any, its end, which says why."""
    ends: dict[str, list[str]] = {}
    for outcome, name in re.findall(r"\[gw\d+\] \[ *\d+%\] ([A-Z]+) (\S+)", log):
        ends.setdefault(outcome.lower(), []).append(name)
    report: Report = {outcome: len(names) for outcome, names in sorted(ends.items())}
    bad = ends.get("failed", []) + ends.get("error", [])
    if bad or not ends:
        report |= {"did_not_pass": bad, "output": log[-4000:]}
    return report


def describe(device: str) -> Report:
    """The machine, with the GPU if one is used."""
    report = machine() | {"torch": torch.__version__}
    if device != "cpu":
        place = torch.cuda.get_device_properties(cuda_index("torch", device))
        report |= {
            "gpu": place.name,
            "gpu_memory_bytes": place.total_memory,
            "compute_capability": f"{place.major}.{place.minor}",
            "cuda": torch.version.cuda,
        }
    return report


@contextmanager
def _freed() -> Iterator[None]:
    try:
        yield
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        torch._dynamo.reset()


def run(
    device: str,
    output: Path,
    *,
    limit: float,
    cases: tuple[Case, ...] = CASES,
    soak_frames: int = 10_000,
    only: tuple[str, ...] = (),
    say: Say = lambda _: None,
) -> Report:
    """All parts, or those whose names begin as one of `only`, within about `limit` seconds.

    Raises:
        EngineError: if the device is not there.
    """
    place = torch_device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)  # Triton launches on the current one
    begun = time.perf_counter()

    def left() -> float:
        return limit - (time.perf_counter() - begun)

    report: Report = {"metadata": describe(device), "device": device}

    def part(name: str, work: Callable[[], Any], at_least: float) -> None:
        if only and not name.startswith(only):
            return
        started = time.perf_counter()
        if left() < at_least:
            value: Any = {"skipped": f"{left():.0f} s left, it wants {at_least:.0f}"}
        else:
            say(f"{name} ({left():.0f} s left)")
            try:
                with _freed():
                    value = work()
            except Exception as error:  # whatever it is, the other parts go on
                value = {"error": _told(error)}
        report[name] = value
        report.setdefault("seconds", {})[name] = round(time.perf_counter() - started, 1)
        write_file(output, json.dumps(report, indent=1) + "\n")

    def measured(case: Case, at_least: float) -> None:
        words = [case.model, case.mode, f"batch {case.batch}"]
        label = ", ".join(words + ([] if case.guided else ["unguided"]))
        part(label, lambda: latency(case, place, seconds=min(CASE_SECONDS, left() / 2)), at_least)

    part("parity", lambda: parity(device, left), 0)
    for case in cases:
        if "compile" not in case.mode:
            measured(case, 10)
    heads = tuple(dict.fromkeys(case.model for case in cases if case.mode in FLOW_KERNELS))
    if heads:
        part("flow heads", lambda: flow_heads(place, left, heads), 60)
    part("engines, toytable", lambda: engines("toytable", device, left), 30)
    part("soak", lambda: soak(device, frames=soak_frames, seconds=left() / 2), 5)
    part("tests", lambda: gpu_tests(seconds=left()), 10)
    if device != "cpu":
        part("engines, bair fp16", lambda: exported("bair", "fp16", device, left), 200)
    for case in cases:  # last: compiling `bair` whole took six minutes of an H200's host
        if "compile" in case.mode:
            wanted = 200 if "cuda graph" in case.mode else 400
            measured(case, 10 if device == "cpu" else wanted)
    return report


app = typer.Typer(add_completion=False)


@app.command()
def main(
    output: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("gpu.json"),
    device: Annotated[str, typer.Option(help="cuda, cuda:<index>, or cpu to try it out.")] = "cuda",
    limit: Annotated[float, typer.Option(help="Seconds for everything.")] = 510,
    only: Annotated[
        list[str] | None, typer.Option(help="Only parts that begin so; repeat as needed.")
    ] = None,
) -> None:
    """Run every GPU test and benchmark and write JSON."""
    check_writable(output)
    run(device, output, limit=limit, only=tuple(only or ()), say=stderr.print)


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    run_command(app)
