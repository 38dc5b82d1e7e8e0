"""Set sizes, order, guidance branches and flow solvers, each against its formula."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.integrate import solve_ivp

from canvasmar_rt.config import SamplingConfig
from canvasmar_rt.engines.torch_program import draw_order
from canvasmar_rt.errors import ConfigError
from canvasmar_rt.schedule import (
    ROTARY_BASE,
    ar_steps,
    branch_inputs,
    first_step_branches,
    flow_plan,
    flow_temperature,
    generation_order,
    guidance_branches,
    order_noise,
    order_temperatures,
    set_sizes,
    time_rotation,
)

Array = npt.NDArray[Any]


# -- flow temperature


def test_the_flow_temperature_goes_linearly_to_its_last() -> None:
    sampling = SamplingConfig(flow_temperature=(1.0, 0.5), temperature_frames=10)
    found = [flow_temperature(sampling, frame) for frame in (0, 5, 10, 1000)]
    assert found == pytest.approx([1.0, 0.75, 0.5, 0.5])
    assert flow_temperature(SamplingConfig(), 7) == 1.0
    with pytest.raises(ConfigError, match="flow_temperature"):
        SamplingConfig(flow_temperature=(1.0, -0.1))
    with pytest.raises(ConfigError, match="temperature_frames"):
        SamplingConfig(temperature_frames=0)


# -- set sizes


def cosine_known(tokens: int, k: int, steps: int) -> int:
    """n - floor(n cos(pi/2 k/K)), with the angles whose cosine is rational done exactly."""
    if k in (0, steps):
        return tokens if k else 0
    if 3 * k == 2 * steps:
        return tokens - tokens // 2
    left = tokens * math.cos(math.pi / 2 * k / steps)
    assert abs(left - round(left)) > 1e-7, "too close to an integer to trust this oracle"
    return tokens - math.floor(left)


def test_set_sizes_of_every_step_count() -> None:
    for tokens in (16, 64, 256, 1024):
        for steps in range(1, min(64, tokens) + 1):
            sizes = set_sizes(tokens, steps)
            assert len(sizes) == steps
            assert sum(sizes) == tokens
            assert min(sizes) >= 1
            formula = [cosine_known(tokens, k, steps) for k in range(steps + 1)]
            want = np.diff(formula)
            if want.min() >= 1:
                assert sizes == tuple(want)
                continue
            # at least one a step: never less known than the formula says, and the formula
            # again as soon as it is ahead
            known = np.cumsum(sizes)
            for k in range(1, steps + 1):
                floor = max(formula[k], (known[k - 2] if k > 1 else 0) + 1)
                assert known[k - 1] == min(floor, tokens - (steps - k))


@pytest.mark.parametrize(
    ("tokens", "steps", "sizes"),
    [
        (256, 4, (20, 55, 84, 97)),
        (256, 1, (256,)),
        (64, 2, (19, 45)),
        (64, 3, (9, 23, 32)),
        (16, 16, (1,) * 16),
        (1, 1, (1,)),
    ],
)
def test_set_sizes_written_out(tokens: int, steps: int, sizes: tuple[int, ...]) -> None:
    assert set_sizes(tokens, steps) == sizes


@pytest.mark.parametrize("steps", [0, -1, 17])
def test_step_counts_out_of_range(steps: int) -> None:
    with pytest.raises(ConfigError, match=rf"1\.\.16 .*got {steps}$"):
        set_sizes(16, steps)


# -- order


def gumbel(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).gumbel(size=shape).astype(np.float32)


def order_of(staticness: Array | None, noise: Array, sampling: SamplingConfig) -> Array:
    out = np.full((noise.shape[0], noise.shape[2]), -1, np.int64)
    generation_order(staticness, noise, sampling, out)
    return out


def plain_order(staticness: Array, noise: Array, temperatures: list[float]) -> Array:
    """Sec. 4.3 token by token in Python: the oracle."""
    batch, steps, tokens = noise.shape
    out = np.empty((batch, tokens), np.int64)
    for b in range(batch):
        left, drawn = list(range(tokens)), list[int]()
        for k, size in enumerate(set_sizes(tokens, steps)):
            score = {
                j: np.log(staticness[b, j]) + np.float32(temperatures[k]) * noise[b, k, j]
                for j in left
            }
            best = sorted(left, key=lambda j: (-score[j], j))[:size]
            drawn += best
            left = [j for j in left if j not in best]
        out[b] = drawn
    return out


@pytest.mark.parametrize("order", ["motion", "maskgit", "random"])
@pytest.mark.parametrize(("tokens", "steps"), [(16, 1), (16, 16), (64, 5), (256, 8)])
def test_order_is_a_permutation(order: Any, tokens: int, steps: int) -> None:
    sampling = SamplingConfig(ar_steps=steps, order=order)
    staticness = np.random.default_rng(0).random((3, tokens), np.float32)
    for given in (staticness, None, np.zeros_like(staticness), np.ones_like(staticness)):
        out = order_of(given, gumbel(1, 3, steps, tokens), sampling)
        np.testing.assert_array_equal(np.sort(out, 1), np.tile(np.arange(tokens), (3, 1)))


@pytest.mark.parametrize(
    ("order", "scale"), [("motion", lambda k, n: k / n), ("maskgit", lambda k, n: 1 - k / n)]
)
@pytest.mark.parametrize("steps", [1, 4, 7])
def test_order_matches_the_rule(order: Any, scale: Callable[[int, int], float], steps: int) -> None:
    sampling = SamplingConfig(ar_steps=steps, order=order, temperature=2.5)
    staticness = np.random.default_rng(2).uniform(0.05, 1, (2, 36)).astype(np.float32)
    noise = gumbel(3, 2, steps, 36)
    temperatures = [2.5 * scale(k, steps) for k in range(1, steps + 1)]
    np.testing.assert_array_equal(
        order_of(staticness, noise, sampling), plain_order(staticness, noise, temperatures)
    )


def test_temperature_directions() -> None:
    for order, want in (
        ("motion", [1.5, 3.0, 4.5, 6.0]),
        ("maskgit", [4.5, 3.0, 1.5, 0.0]),
        ("random", [1.0, 1.0, 1.0, 1.0]),
    ):
        sampling = SamplingConfig(ar_steps=4, order=order, temperature=6.0)  # type: ignore[arg-type]
        got = order_temperatures(sampling)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


def test_ties_go_to_the_lower_index() -> None:
    sampling = SamplingConfig(ar_steps=4, temperature=0.0)
    alike = np.full((1, 16), 0.5, np.float32)
    assert order_of(alike, gumbel(0, 1, 4, 16), sampling).tolist() == [list(range(16))]
    two = alike.copy()
    two[0, [3, 7, 11]] = 0.9
    rest = [j for j in range(16) if j not in (3, 7, 11)]
    assert order_of(two, gumbel(0, 1, 4, 16), sampling).tolist() == [[3, 7, 11, *rest]]
    quiet = np.zeros((1, 4, 16), np.float32)
    random = SamplingConfig(ar_steps=4, order="random")
    assert order_of(None, quiet, random).tolist() == [list(range(16))]


def first_steps_stillness(order: Any, temperature: float) -> tuple[float, float]:
    """Share of the still half among the tokens of the first and the last of four steps."""
    sampling = SamplingConfig(ar_steps=4, order=order, temperature=temperature)
    staticness = np.where(np.arange(64) % 2, 0.9, 0.05).astype(np.float32)
    batch = 400
    out = order_of(np.tile(staticness, (batch, 1)), gumbel(4, batch, 4, 64), sampling)
    first, *_, last = set_sizes(64, 4)
    return float(np.mean(out[:, :first] % 2)), float(np.mean(out[:, -last:] % 2))


def test_motion_order_draws_still_regions_first() -> None:
    first, last = first_steps_stillness("motion", 6.5)
    assert first > 0.7
    assert last < 0.5
    cold, _ = first_steps_stillness("motion", 0.0)
    assert cold == 1.0
    # MaskGiT's direction is the other way round: its first step is the most random one
    assert first_steps_stillness("maskgit", 6.5)[0] < first - 0.03
    assert abs(first_steps_stillness("random", 6.5)[0] - 0.5) < 0.03


def test_random_order_ignores_staticness_and_temperature() -> None:
    noise = gumbel(5, 2, 4, 64)
    staticness = np.random.default_rng(6).random((2, 64), np.float32)
    plain = order_of(None, noise, SamplingConfig(order="random"))
    for temperature in (0.0, 6.5):
        sampling = SamplingConfig(order="random", temperature=temperature)
        np.testing.assert_array_equal(order_of(staticness, noise, sampling), plain)


def test_rows_of_an_order_do_not_mix() -> None:
    sampling, noise = SamplingConfig(ar_steps=4), gumbel(7, 3, 4, 64)
    staticness = np.random.default_rng(8).random((3, 64), np.float32)
    together = order_of(staticness, noise, sampling)
    for b in range(3):
        alone = order_of(staticness[b : b + 1], noise[b : b + 1], sampling)
        np.testing.assert_array_equal(alone[0], together[b])


def test_order_leaves_its_inputs_alone() -> None:
    staticness = np.random.default_rng(9).random((1, 16), np.float32)
    noise = gumbel(9, 1, 4, 16)
    copies = staticness.copy(), noise.copy()
    order_of(staticness, noise, SamplingConfig(ar_steps=4))
    np.testing.assert_array_equal(staticness, copies[0])
    np.testing.assert_array_equal(noise, copies[1])


# -- guidance

WEIGHTS = (0.0, 0.3, 0.9999, 1.0, 1.1, 1.2, 1.5, 2.25, 7.5, 10_000.0)


@pytest.mark.parametrize("has_canvas", [True, False])
@pytest.mark.parametrize(("w_t", "w_s"), list(itertools.product(WEIGHTS, WEIGHTS)))
def test_guidance_is_equation_9(w_t: float, w_s: float, has_canvas: bool) -> None:
    sampling = SamplingConfig(temporal_guidance=w_t, canvas_guidance=w_s)
    branches = guidance_branches(sampling, has_canvas=has_canvas)
    v_0, v_t, v_ts = np.random.default_rng(10).normal(size=(3, 50))
    velocity = {(0, 0): v_0, (1, 0): v_t, (1, 1): v_ts}
    want = v_0 + w_t * (v_t - v_0) + (w_s * (v_ts - v_t) if has_canvas else 0)
    rows = list(zip(branches.temporal_on, branches.canvas_on, branches.weight, strict=True))
    got = sum(weight * velocity[int(t), int(c)] for t, c, weight in rows)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * max(w_t, w_s, 1))
    seen = [(int(t), int(c)) for t, c, _ in rows]
    assert len(set(seen)) == len(seen)
    assert branches.weight.all(), "a branch without weight is computed"
    assert has_canvas or (1, 1) not in seen
    for array in (branches.temporal_on, branches.canvas_on, branches.weight):
        assert array.dtype == np.float32


@pytest.mark.parametrize(
    ("w_t", "w_s", "has_canvas", "kept"),
    [
        (1.0, 1.0, True, [(1, 1)]),
        (1.0, 1.5, True, [(1, 1), (1, 0)]),
        (1.5, 1.5, True, [(1, 1), (0, 0)]),
        (1.2, 1.5, True, [(1, 1), (1, 0), (0, 0)]),
        (1.2, 0.0, True, [(1, 0), (0, 0)]),
        (0.0, 0.0, True, [(0, 0)]),
        (1.0, 0.0, True, [(1, 0)]),
        (1.0, 1.5, False, [(1, 0)]),
        (0.0, 1.5, False, [(0, 0)]),
        (1.2, 1.5, False, [(1, 0), (0, 0)]),
        (0.1 + 0.2, 0.3, True, [(1, 1), (0, 0)]),
    ],
)
def test_branches_that_vanish_are_not_computed(
    w_t: float, w_s: float, has_canvas: bool, kept: list[tuple[int, int]]
) -> None:
    sampling = SamplingConfig(temporal_guidance=w_t, canvas_guidance=w_s)
    branches = guidance_branches(sampling, has_canvas=has_canvas)
    assert list(zip(branches.temporal_on, branches.canvas_on, strict=True)) == kept
    inputs = branch_inputs(sampling, has_canvas=has_canvas)
    seeing = sum(branch != (0, 0) for branch in kept)
    assert first_step_branches(inputs, ["spatial", "unconditional"]) == seeing
    assert first_step_branches(inputs, ["spatial"]) == len(kept)


# -- flow solvers


def field(x: float, u: float) -> float:
    """x' = x cos 3u, so that x(1) = x(0) exp(sin(3) / 3)."""
    return x * math.cos(3 * u)


def run_plan(solver: Any, steps: int, f: Callable[[float, float], float], x: float) -> float:
    plan = flow_plan(SamplingConfig(solver=solver, flow_steps=steps))
    last = 0.0
    for time, new, old in zip(plan.time, plan.step_new, plan.step_old, strict=True):
        v = f(x, float(time))
        x, last = x + float(new) * v + float(old) * last, v
    return x


def euler(f: Callable[[float, float], float], x: float, steps: int) -> float:
    dt = 1 / steps
    for i in range(steps):
        x += dt * f(x, i * dt)
    return x


def heun(f: Callable[[float, float], float], x: float, steps: int) -> float:
    dt = 1 / steps
    for i in range(steps):
        first = f(x, i * dt)
        x += dt / 2 * (first + f(x + dt * first, (i + 1) * dt))
    return x


def ab2(f: Callable[[float, float], float], x: float, steps: int) -> float:
    dt = 1 / steps
    before = f(x, 0.0)
    x += dt * before  # the first step has no past: Euler
    for i in range(1, steps):
        now = f(x, i * dt)
        x, before = x + dt * (3 * now - before) / 2, now
    return x


SOLVERS = {"euler": (euler, 1), "heun": (heun, 2), "ab2": (ab2, 2)}


def stiffer(x: Any, u: float) -> Any:
    return math.sin(5 * u) - x * x


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 30])
def test_solvers_equal_the_textbook(solver: str, steps: int) -> None:
    for f in (field, stiffer):
        want = SOLVERS[solver][0](f, 1.3, steps)
        assert run_plan(solver, steps, f, 1.3) == pytest.approx(want, rel=3e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_orders_of_convergence(solver: str) -> None:
    order = SOLVERS[solver][1]
    linear = 1.3 * math.exp(math.sin(3.0) / 3)
    other = solve_ivp(lambda u, x: stiffer(x, u), (0, 1), [1.3], rtol=1e-11, atol=1e-12)
    for f, want in ((field, linear), (stiffer, float(other.y[0, -1]))):
        errors = [abs(run_plan(solver, n, f, 1.3) - want) for n in (32, 64, 128)]
        for coarse, fine in itertools.pairwise(errors):
            assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


def test_plans_written_out() -> None:
    quarter = flow_plan(SamplingConfig(flow_steps=4))
    np.testing.assert_allclose(quarter.time, [0, 0.25, 0.5, 0.75])
    np.testing.assert_allclose(quarter.step_new, [0.25] * 4)
    np.testing.assert_array_equal(quarter.step_old, [0] * 4)
    half = flow_plan(SamplingConfig(flow_steps=2, solver="heun"))
    np.testing.assert_allclose(half.time, [0, 0.5, 0.5, 1])
    np.testing.assert_allclose(half.step_new, [0.5, 0.25, 0.5, 0.25])
    np.testing.assert_allclose(half.step_old, [0, -0.25, 0, -0.25])
    past = flow_plan(SamplingConfig(flow_steps=3, solver="ab2"))
    np.testing.assert_allclose(past.step_new, np.float32([1 / 3, 0.5, 0.5]))
    np.testing.assert_allclose(past.step_old, np.float32([0, -1 / 6, -1 / 6]))
    for plan in (quarter, half, past):
        assert {plan.time.dtype, plan.step_new.dtype, plan.step_old.dtype} == {np.dtype("f4")}


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_constant_velocity_is_followed_exactly(solver: str) -> None:
    """Rectified flow of a straight path: noise + (data - noise) in any number of steps."""
    for steps in (1, 7, 30):
        assert run_plan(solver, steps, lambda x, u: -2.5, 0.75) == pytest.approx(-1.75, abs=1e-5)


# -- rotary times


@pytest.mark.parametrize("time", [0, 1, 7, 10_000_000])
def test_time_rotation(time: int) -> None:
    pairs = 8
    got = time_rotation(time, pairs)
    assert got.shape == (2, pairs)
    assert got.dtype == np.float32
    angles = [time * ROTARY_BASE ** (-i / pairs) for i in range(pairs)]
    want = [[math.cos(a) for a in angles], [math.sin(a) for a in angles]]
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_order_tells_what_moves_from_what_moves_more() -> None:
    """Down to a staticness of a millionth."""
    sampling = SamplingConfig(ar_steps=4, temperature=0.1)
    staticness = np.exp(np.random.default_rng(2).uniform(-13, 0, (2, 36))).astype(np.float32)
    noise = gumbel(3, 2, 4, 36)
    temperatures = [0.1 * k / 4 for k in range(1, 5)]
    want = plain_order(staticness, noise, temperatures)
    np.testing.assert_array_equal(order_of(staticness, noise, sampling), want)
    drawn = draw_order(
        torch.from_numpy(staticness), torch.from_numpy(noise), sampling, ar_steps(36, 4)
    )
    np.testing.assert_array_equal(drawn, want)


def test_fewer_steps_read_the_first_numbers_of_every_row() -> None:
    noise = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    got = order_noise(noise, 2)
    assert got.shape == (2, 3, 2, 5)
    np.testing.assert_array_equal(got.reshape(2, -1), noise.reshape(2, -1)[:, :30])
    assert np.shares_memory(got, noise)
