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

PACE_FRAMES = 8
"""Latest frames whose median says how slow the machine is at present."""
HICCUP_FRAMES = 64
HICCUP_QUANTILE = 0.985
"""Of what single frames take beyond that: one in 64 is no trend."""
MARGIN = 1.25
"""On both: what comes next may be worse than what was seen in so few frames."""
FEWEST_FLOW_STEPS = 3


def ladder(
    sampling: SamplingConfig, *, unrolled: bool = False, has_canvas: bool = True
) -> tuple[SamplingConfig, ...]:
    """Sampling options from `sampling` down to one AR step of few flow steps without guidance, each
    about half as dear as the one before. Flow steps go first: they cost most and are missed least.
    `unrolled` graphs have a fixed number of them."""
    rungs = [sampling]
    while (steps := rungs[-1].flow_steps) > FEWEST_FLOW_STEPS and not unrolled:
        fewer = max(FEWEST_FLOW_STEPS, steps // 2)
        rungs.append(dataclasses.replace(rungs[-1], flow_steps=fewer))
    while rungs[-1].ar_steps > 1:
        rungs.append(dataclasses.replace(rungs[-1], ar_steps=rungs[-1].ar_steps // 2))
    if rungs[-1].guided(has_canvas=has_canvas):
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
        self,
        levels: Sequence[SamplingConfig | None],
        times: Sequence[Sequence[Timed]],
        *,
        looked: Sequence[Timed] = (),
        has_canvas: bool = True,
    ) -> None:
        """`levels` from the best to the cheapest, None for the canvas alone; `times` of each, as
        measured on this machine in as many frames.

        pace: how many times as long as at warm-up the latest frames took. hiccup: seconds that a
        frame may take beyond that."""
        self._rest = [float(np.median([t.rest for t in row])) for row in times]
        self._lead = float(np.median([t.lead for row in times for t in row]))
        # what a look at the canvas has done of the rest, where without one nothing is
        front = float(np.median([t.lead for t in looked])) if looked else self._lead
        self._ahead = max(0.0, front - self._lead)
        self._paces: collections.deque[float] = collections.deque([1.0], maxlen=PACE_FRAMES)
        self._hiccups: collections.deque[float] = collections.deque(maxlen=HICCUP_FRAMES)
        for turn in zip(*times, strict=True):
            for level, timed in enumerate(turn):
                self._hiccups.append(timed.lead + timed.rest - self._usual(level))
        self.pace, self.hiccup = 1.0, self._usual_hiccup()
        totals = [[1e3 * (t.lead + t.rest) for t in row] for row in times]
        self.table = tuple(
            Rung(
                level.ar_steps if level else 0,
                level.flow_steps if level else 0,
                level is not None and level.guided(has_canvas=has_canvas),
                float(np.quantile(row, 0.5)),
                float(np.quantile(row, 0.99)),
            )
            for level, row in zip(levels, totals, strict=True)
        )

    def _usual(self, level: int) -> float:
        return self._lead + self._rest[level]

    def _usual_hiccup(self) -> float:
        return max(0.0, float(np.quantile(self._hiccups, HICCUP_QUANTILE, method="lower")))

    def choose(self, seconds: float, *, looked: bool = False) -> int:
        """The best level whose remaining work nearly always fits into `seconds` at the machine's
        present pace; the cheapest if none does."""
        room = seconds / MARGIN - self.hiccup
        ahead = self._ahead if looked else 0.0
        fits = (i for i, rest in enumerate(self._rest) if (rest - ahead) * self.pace <= room)
        return next(fits, len(self._rest) - 1)

    def record(self, level: int, timed: Timed) -> None:
        """A frame of `level` took this long."""
        taken, usual = timed.lead + timed.rest, self._usual(level)
        self._paces.append(taken / usual)
        self.pace = float(np.median(self._paces))
        self._hiccups.append(taken - usual * self.pace)
        self.hiccup = self._usual_hiccup()
