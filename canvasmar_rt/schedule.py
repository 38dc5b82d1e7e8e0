"""What is fixed before a frame is drawn: set sizes, order, guidance branches, flow solver.

Everything here is NumPy and deterministic, so every engine draws the same tokens in the same order.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from canvasmar_rt.config import SamplingConfig
from canvasmar_rt.errors import ConfigError

Float32 = npt.NDArray[np.float32]


def set_sizes(tokens: int, ar_steps: int) -> tuple[int, ...]:
    """Tokens drawn in each AR step: after step k, N - floor(N cos(pi/2 * k/K)) are known (MaskGiT's
    cosine schedule), and every step draws at least one.

    Raises:
        ConfigError: if there are more steps than tokens.
    """
    if not 1 <= ar_steps <= tokens:
        raise ConfigError(f"ar_steps must lie in 1..{tokens} (tokens of a frame), got {ar_steps}")
    sizes, known = [], 0
    for k in range(1, ar_steps + 1):
        # the last step draws the rest; cos(pi/2) is not exactly zero in floating point
        target = tokens - math.floor(tokens * math.cos(math.pi / 2 * k / ar_steps) + 1e-9)
        target = min(max(target, known + 1), tokens - (ar_steps - k))
        sizes.append(target - known)
        known = target
    return tuple(sizes)


@dataclasses.dataclass(frozen=True)
class ArStep:
    """One AR step: how many tokens are `known` before it, how many it draws, of how many `left`.

    `parts` are the slices of the order that its index inputs hold, by their names without
    "_index"; the first step has no `known`."""

    known: int
    drawn: int
    left: int

    @property
    def parts(self) -> dict[str, slice]:
        tokens = self.known + self.left
        parts = {
            "select": slice(self.known, self.known + self.drawn),
            "mask": slice(self.known, tokens),
        }
        return parts | ({"known": slice(0, self.known)} if self.known else {})


def ar_steps(tokens: int, count: int) -> tuple[ArStep, ...]:
    """The AR steps of a frame (`set_sizes`)."""
    steps, known = [], 0
    for size in set_sizes(tokens, count):
        steps.append(ArStep(known, size, tokens - known))
        known += size
    return tuple(steps)


def order_temperatures(sampling: SamplingConfig, *, has_staticness: bool = True) -> Float32:
    """tau_k of each AR step, (K,): rising for the motion-aware order (sec. 4.3), falling for
    MaskGiT's; ones where the noise alone decides, whatever its scale: for a plain random order,
    and without staticness."""
    k = np.arange(1, sampling.ar_steps + 1) / sampling.ar_steps
    if sampling.order == "random" or not has_staticness:
        return np.ones(sampling.ar_steps, np.float32)
    return np.float32(sampling.temperature) * (k if sampling.order == "motion" else 1.0 - k).astype(
        np.float32
    )


def flow_temperature(sampling: SamplingConfig, frame: int) -> float:
    """What the flow's noise is scaled by in latent frame `frame` of a video."""
    start, end = sampling.flow_temperature
    return start + (end - start) * min(frame / sampling.temperature_frames, 1.0)


def generation_order(
    staticness: Float32 | None,
    gumbel: Float32,
    sampling: SamplingConfig,
    out: npt.NDArray[np.int64],
) -> None:
    """Write the order in which the N tokens of a frame are drawn into `out` (..., N) int64.

    Step k takes its n_k best of log(staticness) + tau_k * gumbel_k among the tokens not yet taken
    (sec. 4.3; ties go to the lower index).

    Args:
        staticness: (..., N) in 0..1, or None (no canvas): every token is alike.
        gumbel: (..., K, N) standard Gumbel noise.
    """
    gumbel, out = gumbel.reshape(-1, *gumbel.shape[-2:]), out.reshape(-1, out.shape[-1])
    batch, steps, tokens = gumbel.shape
    tau = order_temperatures(sampling, has_staticness=staticness is not None)
    if staticness is None or sampling.order == "random":
        confidence = np.zeros((batch, tokens), np.float32)
    else:
        confidence = np.log(np.maximum(staticness.reshape(batch, tokens), np.float32(1e-6)))
    start = 0
    taken = np.zeros((batch, tokens), bool)
    rows = np.arange(batch)[:, None]
    for k, size in enumerate(set_sizes(tokens, steps)):
        score = confidence + tau[k] * gumbel[:, k]
        score[taken] = -np.inf
        best = np.argsort(-score, axis=1, kind="stable")[:, :size]
        out[:, start : start + size] = best
        taken[rows, best] = True
        start += size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Branches:
    """Guidance branches that are computed (eq. 9), each (G,) float32: whether it sees the temporal
    embedding and the canvas, and its weight in the velocity."""

    temporal_on: Float32
    canvas_on: Float32
    weight: Float32


def guidance_branches(sampling: SamplingConfig, *, has_canvas: bool) -> Branches:
    """v = (1 - w_t) v_0 + (w_t - w_s) v_t + w_s v_ts (eq. 9 regrouped); a branch whose weight
    vanishes is not computed. Without a canvas: v = (1 - w_t) v_0 + w_t v_t."""
    w_t, w_s = sampling.temporal_guidance, sampling.canvas_guidance if has_canvas else 0.0
    table = [(1.0, 1.0, w_s), (1.0, 0.0, w_t - w_s), (0.0, 0.0, 1.0 - w_t)]
    kept = np.array([row for row in table if abs(row[2]) > 1e-9], np.float32)
    return Branches(temporal_on=kept[:, 0], canvas_on=kept[:, 1], weight=kept[:, 2])


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowPlan:
    """The flow solver as one recurrence over E evaluations of the velocity v(x, u):
    x <- x + step_new[e] * v_e + step_old[e] * v_{e-1}, v_e = v(x, time[e]). Each (E,) float32."""

    time: Float32
    step_new: Float32
    step_old: Float32


def flow_plan(sampling: SamplingConfig) -> FlowPlan:
    """Euler (S evaluations), Heun (2S) and two-step Adams-Bashforth (S) on a uniform grid of S
    steps from noise (u = 0) to data (u = 1)."""
    steps = sampling.flow_steps
    dt = 1.0 / steps
    u = np.arange(steps) * dt
    if sampling.solver == "heun":
        # x' = x + dt v1, then x = x' + dt/2 (v2 - v1)
        time = np.stack([u, u + dt], 1).reshape(-1)
        new = np.tile([dt, dt / 2], steps)
        old = np.tile([0.0, -dt / 2], steps)
    else:
        time, new, old = u, np.full(steps, dt), np.zeros(steps)
        if sampling.solver == "ab2":
            new[1:], old[1:] = 1.5 * dt, -0.5 * dt
    return FlowPlan(
        time=time.astype(np.float32),
        step_new=new.astype(np.float32),
        step_old=old.astype(np.float32),
    )


def solver_inputs(sampling: SamplingConfig) -> dict[str, Float32]:
    """The graph inputs that only sampling options decide, by their names: noise levels, the flow
    plan."""
    plan = flow_plan(sampling)
    return {
        "frame_noise_level": np.array(sampling.frame_noise, np.float32),
        "canvas_noise_level": np.array(sampling.canvas_noise, np.float32),
        "flow_time": plan.time,
        "step_new": plan.step_new,
        "step_old": plan.step_old,
    }


def branch_inputs(sampling: SamplingConfig, *, has_canvas: bool) -> dict[str, Float32]:
    """The graph inputs of the guidance branches, by their names."""
    branches = guidance_branches(sampling, has_canvas=has_canvas)
    return {
        "temporal_on": branches.temporal_on.copy(),
        "canvas_on": branches.canvas_on.copy(),
        "branch_weight": branches.weight.copy(),
    }


def first_step_branches(inputs: Mapping[str, Float32], components: Collection[str]) -> int:
    """How many of the branches in `branch_inputs` the first AR step draws: all, or, where
    `unconditional` is among the components, those that see anything; one that does not is the
    last."""
    nothing = not (inputs["temporal_on"][-1] or inputs["canvas_on"][-1])
    return len(inputs["branch_weight"]) - int(nothing and "unconditional" in components)


def order_noise(noise: Any, ar_steps: int) -> Any:
    """Of the order's noise (B, [J,] K, N), of NumPy or PyTorch, what a rollout of so many AR steps
    (at most K) draws, the first numbers of every row: (B, [J,] ar_steps, N), a view."""
    *group, _, tokens = noise.shape[1:]
    rows = noise.reshape(len(noise), -1)[:, : math.prod(group) * ar_steps * tokens]
    return rows.reshape(len(noise), *group, ar_steps, tokens)


def time_rotation(time: int, pairs: int) -> Float32:
    """Cosine and sine (2, pairs) of the rotary angles of absolute latent time, computed in float64
    so that frame 10,000,000 is as exact as frame 1."""
    angle = float(time) * ROTARY_BASE ** (-np.arange(pairs) / pairs)
    return np.stack([np.cos(angle), np.sin(angle)]).astype(np.float32)


ROTARY_BASE = 100.0
"""Base of the rotary frequencies. Windows and grids are a few dozen positions long, so the usual
10000 would leave most channels unrotated."""
