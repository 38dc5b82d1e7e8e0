"""Latency of a bundle beside other systems that continue the same clip, interleaved.

All contestants play the same clip in turn, so a machine that speeds up or slows down moves all of
them; ratios are taken per turn.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime

import canvasmar_rt
from canvasmar_rt.benchmarks.contestants import (
    Contestant,
    Played,
    RolloutContestant,
    check_groups,
    group_of,
)
from canvasmar_rt.config import ModelConfig
from canvasmar_rt.engines.program import UInt8
from canvasmar_rt.errors import ConfigError, EngineError
from canvasmar_rt.rollout import Predictor

OURS = "ours"
HOST = ("noise", "input", "order", "output")
"""Parts of a frame the rollout spends outside its engine."""
BOUNDARY = {
    "first_frame": "from the context being in the caches to the pixels of the first predicted "
    "latent frame on the host: noise, every network, decoding. A system that denoises a whole "
    "chunk has denoised all of it by then",
    "frame": "from one latent frame's pixels to the next one's, those that are ready at once "
    "sharing the time; for a system that denoises a whole chunk, the clip's time over its latent "
    "frames",
    "clip": "from the context being in the caches to the pixels of the last predicted latent frame",
    "without_autoencoder": "the same without the time spent in the decoder",
    "outside": "loading, compiling, binding, warm-up, and encoding the context",
}

SETTLE = 1.0
"""Seconds. A clip shorter than this is played untimed once before it is timed: threads of the one
before spin on for a while, and caches are cold."""

MAX_CONTEXT = 1024
"""Latent frames: as many as the largest window. They are made and encoded at once."""

SOAK_FROM = 100
"""Resident memory at the end of a soak is compared with that at this frame."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Clips of `frames` latent frames (None: up to the end of the model's window) are continued
    from `context` latent frames; `iterations` clips are timed after `warmup` untimed ones. `soak`
    latent frames are then run to see whether memory grows (0: none)."""

    batches: tuple[int, ...] = (1,)
    baselines: tuple[str, ...] = ()
    context: int = 2
    frames: int | None = None
    warmup: int = 2
    iterations: int = 10
    soak: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.batches or self.iterations < 1 or self.warmup < 0 or self.soak < 0:
            raise ConfigError("bench: need a batch, iterations >= 1, warmup >= 0 and soak >= 0")
        if len(set(self.batches)) < len(self.batches):  # rows of the CSV could not be told apart
            raise ConfigError(f"bench: a batch size is given twice in {self.batches}")
        if self.context < 1 or (self.frames is not None and self.frames < 1):
            raise ConfigError("bench: context and frames must be at least 1 latent frame")
        if self.context > MAX_CONTEXT:
            raise ConfigError(
                f"bench: a context has at most {MAX_CONTEXT} latent frames, got {self.context}"
            )
        if self.soak and self.soak <= SOAK_FROM:
            raise ConfigError(f"bench: a soak must be longer than {SOAK_FROM} frames")

    def predicted(self, config: ModelConfig) -> int:
        """Latent frames of a clip, whole groups of our model and of those beside it.

        Raises:
            ConfigError: if the context leaves none, or those asked for are no whole groups.
        """
        frames = config.context_frames - self.context if self.frames is None else self.frames
        if frames < 1:
            raise ConfigError(
                f"bench: a context of {self.context} latent frames fills the window of "
                f"{config.context_frames}; give --frames, or a smaller --context"
            )
        group = math.lcm(config.group, *map(group_of, self.baselines))
        if self.frames is None:
            frames = max(frames // group, 1) * group
        check_groups(frames, group)
        return frames


Make = Callable[[UInt8, int], Contestant]
"""A contestant from its context, uint8 (T, H, W, 3), and batch size."""


def bench(
    predictor: Predictor,
    options: BenchOptions,
    others: Mapping[str, Make],
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    so_far: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Measure a predictor, and `others` beside it. `so_far` is given the report after every batch
    size but the last, for whom an interrupt must not cost it.

    Returns:
        JSON-ready: `config`, `metadata`, `timed_boundary`, and `metrics` for every batch size.

    Raises:
        EngineError: if a contestant needs packages that are not installed, or for a soak where
            /proc is not to be had.
        ConfigError: if the options leave no frame to predict.
        InputError: for a batch size that the bundle does not take.
    """
    config = predictor.config
    frames = options.predicted(config)
    for batch in options.batches:
        predictor.bundle.manifest.batch.require(batch, "bench: ")
    if options.soak:
        resident_bytes()  # where it cannot be had, that is told before the minutes of the rest
    context = moving_clip(config, options.context)

    def ours(context: UInt8, batch: int) -> Contestant:
        return RolloutContestant(OURS, predictor, context, batch=batch, seed=options.seed)

    described: dict[str, Any] = {}
    metrics: list[dict[str, Any]] = []
    report: dict[str, Any] = {
        "config": {
            "model": config.name,
            "source": predictor.bundle.manifest.source,
            **dataclasses.asdict(options),
            "frames": frames,
            "contestants": described,
        },
        "metadata": machine(),
        "timed_boundary": BOUNDARY,
        "metrics": metrics,
    }
    for batch in options.batches:
        label = f"batch {batch}"
        runs, memory = [], {}
        for name, make in {OURS: ours, **others}.items():
            progress(f"{label}: preparing {name}", 0, 1)
            with _peak_memory(predictor.engine.device) as peak:
                contestant = make(context, batch)
                contestant.play(frames)
            runs.append(contestant)
            memory[name] = peak
            described[name] = dict(contestant.described)
            del contestant  # or it would outlive its batch
        played = play_in_turn(
            runs, frames, options.warmup, options.iterations,
            lambda done, total, label=label: progress(label, done, total),  # type: ignore[misc]
        )  # fmt: skip
        pixels = batch * frames * config.autoencoder.temporal_compression
        measured = {
            run.name: summary(played[run.name], pixels, chunked=run.chunked) | memory[run.name]
            for run in runs
        }
        metrics.append(
            {
                "batch": batch,
                "contestants": measured,
                "over_ours": {
                    name: ratios(played[name], played[OURS]) for name in others if name in played
                },
            }
        )
        del runs
        if batch != options.batches[-1] or options.soak:
            so_far(report)
    report["metadata"] = machine()  # PyTorch may have come with a baseline
    if options.soak:
        report["soak"] = _soak(predictor, options, lambda d, t: progress("soak", d, t))
    return report


def moving_clip(config: ModelConfig, latent_frames: int) -> UInt8:
    """A context of so many latent frames, uint8 (T, H, W, 3): waves that move."""
    ae = config.autoencoder
    t = np.arange(1 + (latent_frames - 1) * ae.temporal_compression)[:, None, None, None]
    y = np.arange(ae.height)[:, None, None]
    x = np.arange(ae.width)[:, None]
    phase = np.array([0.0, 2.0, 4.0])
    waves = np.sin(0.3 * x + 0.2 * t + phase) * np.cos(0.2 * y - 0.1 * t)
    return np.asarray(127.5 + 120.0 * waves, np.uint8)


def play_in_turn(
    contestants: Sequence[Contestant],
    frames: int,
    warmup: int,
    iterations: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[Played]]:
    """The timed clips of every contestant, by name; entry i of all of them is of one turn."""
    played: dict[str, list[Played]] = {c.name: [] for c in contestants}
    for i in range(warmup + iterations):
        for contestant in contestants:
            clip = contestant.play(frames)
            if clip.ready[-1] < SETTLE:
                clip = contestant.play(frames)
            if i >= warmup:
                played[contestant.name].append(clip)
        progress(i + 1, warmup + iterations)
    return played


def quantities(clip: Played) -> dict[str, float]:
    """Seconds of the quantities that are compared between systems."""
    found = {"first_frame": clip.ready[0], "clip": clip.ready[-1]}
    if clip.decoding is not None:
        found["first_frame_without_autoencoder"] = clip.ready[0] - clip.decoding[0]
        found["clip_without_autoencoder"] = clip.ready[-1] - clip.decoding[-1]
    return found


def summary(clips: Sequence[Played], pixel_frames: int, *, chunked: bool) -> dict[str, Any]:
    """Percentiles of one contestant's clips, each of so many pixel frames, and its split."""
    each = [quantities(clip) for clip in clips]
    if chunked:
        steady = [clip.ready[-1] / len(clip.ready) for clip in clips]
    else:
        steady = [s for clip in clips for s in _each_frame(clip)]
    result: dict[str, Any] = {"frame_ms": percentiles(steady)}
    result |= {f"{name}_ms": percentiles([e[name] for e in each]) for name in each[0]}
    seconds = float(np.median([clip.ready[-1] for clip in clips]))
    result["pixel_frames_per_second"] = round(pixel_frames / seconds, 2)
    if clips[0].parts:
        frames = len(clips[0].ready)
        result["component_ms"] = {
            part: round(1e3 * float(np.median([c.parts[part] for c in clips])) / frames, 3)
            for part in clips[0].parts
        }
        if told := set(HOST) & set(clips[0].parts):
            outside = sum(c.parts[part] for c in clips for part in told)
            result["outside_engine_share"] = round(outside / sum(c.ready[-1] for c in clips), 5)
    return result


def _each_frame(clip: Played) -> list[float]:
    """Seconds of each latent frame; those that were ready at once share the time they took."""
    ends, counts = np.unique(clip.ready, return_counts=True)
    return [float(s) for s in np.repeat(np.diff(ends, prepend=0.0) / counts, counts)]


def ratios(theirs: Sequence[Played], ours: Sequence[Played]) -> dict[str, dict[str, float]]:
    """Their time over ours by quantity, taken per turn: median, 5th and 95th percentile; of twenty
    turns or fewer the least and the greatest."""
    pairs = [(quantities(a), quantities(b)) for a, b in zip(theirs, ours, strict=True)]
    result, shared = {}, [name for name in pairs[0][0] if name in pairs[0][1]]
    for name in shared:
        found = [a[name] / b[name] for a, b in pairs]
        spread = {
            "p5": np.percentile(found, 5, method="lower"),
            "median": np.median(found),
            "p95": np.percentile(found, 95, method="higher"),
        }
        result[name] = {statistic: round(float(ratio), 3) for statistic, ratio in spread.items()}
    return result


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Of latencies in seconds, in ms; `jitter` is their standard deviation."""
    values = {f"p{q}": round(1e3 * float(np.percentile(seconds, q)), 3) for q in (50, 90, 95, 99)}
    return values | {"jitter": round(1e3 * float(np.std(seconds)), 3)}


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            lines = [x.split(":") for x in file.read().partition("\n\n")[0].splitlines()]
        first = {x[0].strip(): x[-1].strip() for x in lines}
        model = first.get("model name", model)
        if "cpu family" in first:  # a virtual machine may keep the name short
            model += f" (family {first['cpu family']}, model {first['model']})"
    except OSError:
        pass
    found = {
        "cpu": model,
        "cpu_threads": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "canvasmar_rt": canvasmar_rt.__version__,
        "numpy": np.__version__,
        "onnxruntime": onnxruntime.__version__,
    }
    if torch := sys.modules.get("torch"):
        found["torch"] = torch.__version__
        if torch.cuda.is_available():
            found["gpu"] = torch.cuda.get_device_name()
    return found


# -- memory


class _peak_memory:
    """Measures the memory that the body takes: growth of the resident set's high-water mark, and of
    the device memory in use, in a dictionary filled at the end (without what cannot be had). Of
    ours that is a rollout; of others also their model, and what exporting it takes."""

    def __init__(self, device: str) -> None:
        self._device = device

    def __enter__(self) -> dict[str, float]:
        self._found: dict[str, float] = {}
        self._host = _reset_peak()
        self._used = _device_memory(self._device)
        return self._found

    def __exit__(self, *error: object) -> None:
        peak = _status("VmHWM")
        if self._host is not None and peak is not None:
            self._found["peak_host_mb"] = round((peak - self._host) / 1e6, 1)
        used = _device_memory(self._device)
        if self._used is not None and used is not None:
            self._found["device_mb"] = round((used - self._used) / 1e6, 1)


def _reset_peak() -> int | None:
    """Lower the resident set's high-water mark to the present size, and return that."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return None
    return _status("VmRSS")


def _status(field: str) -> int | None:
    """Bytes of a field of /proc/self/status."""
    try:
        with open("/proc/self/status") as file:
            line = next((x for x in file if x.startswith(f"{field}:")), None)
    except OSError:
        return None
    return None if line is None else 1024 * int(line.split()[1])


def _device_memory(device: str) -> int | None:
    """Bytes in use on a GPU by all processes; None on the CPU."""
    if device == "cpu":
        return None
    try:
        runtime = importlib.import_module("cuda.bindings.runtime")  # it has no types
    except ImportError:
        return None
    error, free, total = runtime.cudaMemGetInfo()
    return None if int(error) else int(total - free)


def resident_bytes() -> int:
    """Resident memory of this process.

    Raises:
        EngineError: where /proc is not to be had.
    """
    resident = _status("VmRSS")
    if resident is None:
        raise EngineError("a soak reads /proc/self/status, which only Linux has; run it there")
    return resident


def _soak(
    predictor: Predictor, options: BenchOptions, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    rollout = predictor.start(seed=options.seed)
    early = 0
    seconds = []
    for i in range(options.soak):
        begun = time.perf_counter()
        rollout.step()
        seconds.append(time.perf_counter() - begun)
        if i + 1 == SOAK_FROM:
            early = resident_bytes()
        progress(i + 1, options.soak)
    late = resident_bytes()
    return {
        "frames": options.soak,
        f"resident_mb_at_{SOAK_FROM}": round(early / 1e6, 2),
        "resident_mb_at_end": round(late / 1e6, 2),
        "growth": round(late / early - 1.0, 5),
        "frame_ms": percentiles(seconds[SOAK_FROM:]),
    }
