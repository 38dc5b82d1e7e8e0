"""Choosing how much work a frame gets, so that it is there in time.

A ladder of sampling options leads from the rollout's own down to the canvas alone. What each rung
takes is measured at warm-up; from then on every frame takes the highest rung that fits what is left
of its budget, and every frame's time corrects the estimate.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from canvasmar_rt.config import SamplingConfig

RECENT = 64
"""Frames that the estimate of the machine's present slowness looks back on."""
QUANTILE = 0.99
RECENT_QUANTILE = 0.97
"""Two bad frames in 64 are no trend."""
FEWEST_FLOW_STEPS = 3


def ladder(sampling: SamplingConfig, *, unrolled: bool = False) -> tuple[SamplingConfig, ...]:
    """Sampling options from `sampling` down to one AR step of few flow steps without guidance, each
    about half as dear as the one before. Flow steps go first: they cost most and are missed least.
    `unrolled` graphs have a fixed number of them."""
    rungs = [sampling]
    while (steps := rungs[-1].flow_steps) > FEWEST_FLOW_STEPS and not unrolled:
        fewer = max(FEWEST_FLOW_STEPS, steps // 2)
        rungs.append(dataclasses.replace(rungs[-1], flow_steps=fewer))
    while rungs[-1].ar_steps > 1:
        rungs.append(dataclasses.replace(rungs[-1], ar_steps=rungs[-1].ar_steps // 2))
    if rungs[-1].guided:
        rungs.append(dataclasses.replace(rungs[-1], temporal_guidance=1.0, canvas_guidance=1.0))
    return tuple(rungs)


@dataclasses.dataclass(frozen=True)
class Timed:
    """Seconds a frame took: `lead` until the amount of work had to be chosen, `rest` after it."""

    lead: float
    rest: float


@dataclasses.dataclass(frozen=True)
class Rung:
    """What a rung of the ladder costs a frame in all, in milliseconds, as measured at warm-up.
    `ar_steps` 0 is the canvas alone."""

    ar_steps: int
    flow_steps: int
    guided: bool
    p50_ms: float
    p99_ms: float


class Deadlines:
    """The latency table of a rollout and its choices."""

    def __init__(
        self, levels: Sequence[SamplingConfig | None], times: Sequence[Sequence[Timed]]
    ) -> None:
        """`levels` from the best to the cheapest, None for the canvas alone; `times` of each, as
        measured on this machine."""
        self._rest = [float(np.median([t.rest for t in row])) for row in times]
        self._lead = float(np.median([t.lead for row in times for t in row]))
        spread = [t.rest / p50 for row, p50 in zip(times, self._rest, strict=True) for t in row]
        self._usual = max(1.0, float(np.quantile(spread, QUANTILE)))
        self._recent: collections.deque[float] = collections.deque(maxlen=RECENT)
        totals = [[1e3 * (t.lead + t.rest) for t in row] for row in times]
        self.table = tuple(
            Rung(
                level.ar_steps if level else 0,
                level.flow_steps if level else 0,
                level is not None and level.guided,
                float(np.quantile(row, 0.5)),
                float(np.quantile(row, QUANTILE)),
            )
            for level, row in zip(levels, totals, strict=True)
        )

    @property
    def slowness(self) -> float:
        """What a rung's median is multiplied with to be kept nearly always: the spread seen at
        warm-up, or that of the recent frames if they are slower."""
        if not self._recent:
            return self._usual
        return max(self._usual, float(np.quantile(self._recent, RECENT_QUANTILE)))

    def choose(self, seconds: float) -> int:
        """The best level whose remaining work fits into `seconds`; the cheapest if none does."""
        margin = self.slowness
        fits = (i for i, rest in enumerate(self._rest) if rest * margin <= seconds)
        return next(fits, len(self._rest) - 1)

    def record(self, level: int, timed: Timed) -> None:
        """A frame of `level` took this long."""
        taken, usual = timed.lead + timed.rest, self._lead + self._rest[level]
        self._recent.append(taken / usual)
