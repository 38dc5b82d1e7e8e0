"""Latency of a rollout, interleaved with the eager PyTorch sampler on the same weights.

The timed boundary of a frame is `Rollout.step`: noise, every component, decoding to uint8 frames.
The baseline draws the same noise and decodes too. Bundle loading, session creation, binding and
warm-up lie outside. A and B alternate frame by frame, so a machine that speeds up or slows down
moves both; the ratio is taken per pair.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime

import canvasmar_rt
from canvasmar_rt.errors import ConfigError, EngineError
from canvasmar_rt.rollout import Predictor

BASELINES = ("none", "eager")
HOST = ("noise", "input", "order", "output")
"""Parts of a frame the rollout spends outside its engine."""
BOUNDARY = (
    "one latent frame: noise, temporal, canvas, all AR and flow steps, decoding to uint8 pixels; "
    "loading, binding and warm-up excluded"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """`iterations` frames are timed after `warmup` untimed ones; `soak` frames are then run to see
    whether memory grows (0: none)."""

    batches: tuple[int, ...] = (1,)
    baseline: str = "none"
    warmup: int = 5
    iterations: int = 30
    soak: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.baseline not in BASELINES:
            raise ConfigError(f"baseline must be one of {', '.join(BASELINES)}")
        if not self.batches or self.iterations < 1 or self.warmup < 0 or self.soak < 0:
            raise ConfigError("bench: need a batch, iterations >= 1, warmup >= 0 and soak >= 0")
        if self.soak and self.soak <= SOAK_FROM:
            raise ConfigError(f"bench: a soak must be longer than {SOAK_FROM} frames")


SOAK_FROM = 100
"""Resident memory at the end of a soak is compared with that at this frame."""


def bench(
    predictor: Predictor,
    options: BenchOptions,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Measure a predictor.

    Returns:
        JSON-ready: `config`, `metadata`, `timed_boundary`, and `metrics` for every batch size.

    Raises:
        EngineError: if the baseline needs packages that are not installed.
    """
    step_baseline = _eager(predictor) if options.baseline == "eager" else None
    metrics = []
    for batch in options.batches:
        label = f"batch {batch}"
        metrics.append(
            _measure(
                predictor, batch, options, step_baseline,
                lambda done, total, label=label: progress(label, done, total),  # type: ignore[misc]
            )
        )  # fmt: skip
    manifest = predictor.bundle.manifest
    report: dict[str, Any] = {
        "config": {
            "model": manifest.model.name,
            "source": manifest.source,
            "dtype": manifest.dtype,
            "engine": predictor.engine.name,
            "device": predictor.engine.device,
            "graph_off": dict(predictor.engine.graph_off),
            "sampling": dataclasses.asdict(predictor.sampling),
            **dataclasses.asdict(options),
        },
        "metadata": machine(),
        "timed_boundary": BOUNDARY,
        "metrics": metrics,
    }
    if options.soak:
        report["soak"] = _soak(predictor, options, lambda d, t: progress("soak", d, t))
    return report


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            names = [x.split(":")[1].strip() for x in file if x.startswith("model name")]
        model = names[0] if names else model
    except OSError:
        pass
    return {
        "cpu": model,
        "cpu_threads": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "canvasmar_rt": canvasmar_rt.__version__,
        "numpy": np.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def _eager(predictor: Predictor) -> Callable[[int, int], Callable[[], None]]:
    """A factory of steppers of the reference sampler, on the bundle's own weights."""
    try:
        import torch  # noqa: F401
    except ImportError:
        raise EngineError(
            "the eager baseline needs PyTorch: pip install 'canvasmar-rt[export]'"
        ) from None
    from canvasmar_rt.engines.torch_engine import load_model
    from canvasmar_rt.models import sampler

    model = load_model(predictor.bundle)

    def make(batch: int, seed: int) -> Callable[[], None]:
        state = sampler.empty_state(model, batch)

        def step() -> None:
            nonlocal state
            noise = sampler.draw_noise(
                model.config, predictor.sampling, seed=seed, streams=range(batch), frame=state.time
            )
            state, _ = sampler.step(model, predictor.sampling, state, noise)

        return step

    return make


def _measure(
    predictor: Predictor,
    batch: int,
    options: BenchOptions,
    baseline: Callable[[int, int], Callable[[], None]] | None,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    rollout = predictor.start(seed=options.seed, batch=batch)
    rollout.warmup()
    other = baseline(batch, options.seed) if baseline else None
    ours: list[float] = []
    theirs: list[float] = []
    parts: dict[str, list[float]] = {}
    total = options.warmup + options.iterations
    for i in range(total):
        begun = time.perf_counter()
        prediction = rollout.step()
        elapsed = time.perf_counter() - begun
        if i >= options.warmup:
            ours.append(elapsed)
            for name, seconds in prediction.timings.items():
                parts.setdefault(name, []).append(seconds)
        if other is not None:
            begun = time.perf_counter()
            other()
            if i >= options.warmup:
                theirs.append(time.perf_counter() - begun)
        progress(i + 1, total)
    t = predictor.config.autoencoder.temporal_compression
    outside = sum(sum(parts[name]) for name in HOST if name in parts)
    result: dict[str, Any] = {
        "batch": batch,
        "frame_ms": percentiles(ours),
        "pixel_frames_per_second": round(batch * t / float(np.median(ours)), 2),
        "outside_engine_share": round(outside / sum(ours), 5),
        "component_ms": {k: round(1e3 * float(np.median(v)), 3) for k, v in parts.items()},
    }
    if theirs:
        ratio = np.array(theirs) / np.array(ours)
        result["eager_frame_ms"] = percentiles(theirs)
        result["eager_over_ours"] = {
            k: round(float(np.percentile(ratio, q)), 3)
            for k, q in (("p5", 5), ("median", 50), ("p95", 95))
        }
    return result


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Of latencies in seconds, in ms; `jitter` is their standard deviation."""
    values = {f"p{q}": round(1e3 * float(np.percentile(seconds, q)), 3) for q in (50, 90, 95, 99)}
    return values | {"jitter": round(1e3 * float(np.std(seconds)), 3)}


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


def resident_bytes() -> int:
    """Resident memory of this process.

    Raises:
        EngineError: where /proc is not to be had.
    """
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError as error:
        raise EngineError(
            f"a soak reads /proc/self/statm, which is missing here ({error})"
        ) from None
