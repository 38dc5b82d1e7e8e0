"""Frames that are there in time, canvases that are there early, videos that share a batch."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import canvasmar_rt
from canvasmar_rt.bundle import Bundle
from canvasmar_rt.config import SamplingConfig
from canvasmar_rt.deadline import HICCUP_FRAMES, MARGIN, PACE_FRAMES, Deadlines, Timed, ladder
from canvasmar_rt.errors import ConfigError, EngineError, InputError, StateError
from canvasmar_rt.rollout import LATEST, Predictor, Rollout

PAPER = SamplingConfig(ar_steps=4, flow_steps=30)
LEVELS = (PAPER, dataclasses.replace(PAPER, flow_steps=10), None)


def steps(levels: tuple[SamplingConfig, ...]) -> list[tuple[int, int, bool]]:
    return [(level.ar_steps, level.flow_steps, level.guided(has_canvas=True)) for level in levels]


def test_the_ladder_leads_to_one_cheap_step() -> None:
    down = [(4, 30), (4, 15), (4, 7), (4, 3), (2, 3), (1, 3)]
    assert steps(ladder(PAPER)) == [(*rung, True) for rung in down] + [(1, 3, False)]
    down = [(4, 30), (2, 30), (1, 30)]
    unrolled = steps(ladder(PAPER, unrolled=True))
    assert unrolled == [(*rung, True) for rung in down] + [(1, 30, False)]
    unguided = SamplingConfig(ar_steps=1, flow_steps=2, temporal_guidance=1.0, canvas_guidance=1.0)
    assert ladder(unguided) == (unguided,)


def deadlines() -> Deadlines:
    """Levels of 40, 20 and 10 ms behind a lead of 5, which vary by a tenth."""
    return Deadlines(
        LEVELS,
        [[Timed(0.005, rest * f) for f in (1.0, 1.0, 1.0, 1.1)] for rest in (0.04, 0.02, 0.01)],
    )


def test_the_best_level_that_fits_is_chosen() -> None:
    table = deadlines()
    assert table.pace == 1.0
    assert 0.001 < table.hiccup <= 0.004
    spare = table.hiccup
    budgets = (0.1, 0.0401 + spare, 0.0399 + spare, 0.0201 + spare, 0.0199 + spare, 0.0)
    assert [table.choose(MARGIN * s) for s in budgets] == [0, 0, 1, 1, 2, 2]
    assert [(r.ar_steps, r.flow_steps) for r in table.table] == [(4, 30), (4, 10), (0, 0)]
    assert table.table[1].p50_ms == pytest.approx(25.0)
    assert 25.0 < table.table[1].p99_ms <= 27.0


def test_what_is_done_when_the_canvas_was_seen_is_not_asked_for_again() -> None:
    rests = (0.04, 0.02, 0.01)
    times = [[Timed(0.005, rest)] * 4 for rest in rests]
    table = Deadlines(LEVELS, times, looked=[Timed(0.013, 0.032)] * 4)
    room = [MARGIN * s for s in (0.041, 0.039, 0.033, 0.031, 0.013, 0.011)]
    assert [table.choose(s) for s in room] == [0, 1, 1, 1, 2, 2]
    assert [table.choose(s, looked=True) for s in room] == [0, 0, 0, 1, 1, 2]


def test_a_slow_machine_is_noticed_and_forgotten() -> None:
    table = deadlines()
    usual = table.hiccup
    table.record(0, Timed(0.005, 0.4))
    for _ in range(20):
        table.record(0, Timed(0.005, 0.04))
    assert table.choose(0.06) == 0  # one bad frame is none
    for _ in range(3):
        table.record(0, Timed(0.01, 0.08))  # twice as long, and at once
    assert table.choose(0.06) > 0
    for _ in range(PACE_FRAMES):
        table.record(1, Timed(0.01, 0.04))
    assert table.pace == pytest.approx(2.0)
    assert table.choose(0.06) > 0
    for _ in range(HICCUP_FRAMES):
        table.record(2, Timed(0.005, 0.01))
    assert table.pace == pytest.approx(1.0)
    assert table.hiccup <= usual
    assert table.choose(0.06) == 0


def test_hiccups_of_a_cheap_level_are_not_multiplied() -> None:
    """Being held up for 4 ms is much of a 15 ms frame, and as little of a long one as of that."""
    table = deadlines()
    for i in range(HICCUP_FRAMES):
        table.record(2, Timed(0.005, 0.014 if i % 8 == 0 else 0.01))
    assert table.pace == pytest.approx(1.0)
    assert table.hiccup == pytest.approx(0.004)
    assert table.choose(MARGIN * 0.0441) == 0


@pytest.fixture(scope="module", params=["onnxruntime", "torch"])
def predictor(bundles: Callable[[str], Bundle], request: pytest.FixtureRequest) -> Predictor:
    return canvasmar_rt.load(bundles("expert").path, engine=request.param)


@pytest.fixture
def rollout(predictor: Predictor, clip: np.ndarray) -> Rollout:
    rollout = predictor.start(clip, seed=9)
    rollout.warmup(deadlines=True)
    return rollout


def test_a_level_draws_what_a_rollout_of_its_own_would(
    predictor: Predictor, rollout: Rollout, clip: np.ndarray
) -> None:
    for level, sampling in enumerate(ladder(predictor.sampling)):
        want = predictor.start(clip, seed=9, sampling=sampling).step()
        rollout.reset()
        got = rollout._step(None, level=level)
        np.testing.assert_array_equal(got.latent, want.latent)
        np.testing.assert_array_equal(got.frames, want.frames)
        assert (got.ar_steps, got.flow_steps) == (sampling.ar_steps, sampling.flow_steps)
        assert got.guided == sampling.guided(has_canvas=True)


def test_without_time_the_canvas_is_the_frame(predictor: Predictor, rollout: Rollout) -> None:
    p = rollout.step(budget_ms=1e-6, decode_canvas=True)
    assert p.deadline_met is False
    assert (p.ar_steps, p.flow_steps, p.order.shape) == (0, 0, (1, 0))
    np.testing.assert_array_equal(p.latent, p.canvas)
    np.testing.assert_array_equal(p.frames, p.canvas_frames)
    # the next frame goes on from it
    follower = predictor.start(seed=9)
    follower.restore(rollout.state())
    np.testing.assert_array_equal(rollout.step().latent, follower.step().latent)


def test_with_time_nothing_is_lost(
    predictor: Predictor, rollout: Rollout, clip: np.ndarray
) -> None:
    want = predictor.start(clip, seed=9).step()
    got = rollout.step(budget_ms=60_000)
    np.testing.assert_array_equal(got.latent, want.latent)
    assert got.deadline_met is True
    assert want.deadline_met is None
    assert len(rollout.latency) == len(ladder(predictor.sampling)) + 1
    assert all(0 < rung.p50_ms <= rung.p99_ms for rung in rollout.latency)


def test_a_budget_needs_its_table(predictor: Predictor, clip: np.ndarray) -> None:
    rollout = predictor.start(clip)
    with pytest.raises(StateError, match=r"warmup\(deadlines=True\)"):
        rollout.step(budget_ms=10)
    with pytest.raises(StateError, match="start from context or call step"):
        predictor.start().warmup(deadlines=True)
    rollout.warmup(deadlines=True)
    with pytest.raises(InputError, match="budget_ms"):
        rollout.step(budget_ms=0)
    for wrong in ("50", np.complex128(50)):
        with pytest.raises(InputError, match="budget_ms"):
            rollout.step(budget_ms=wrong)  # type: ignore[arg-type]
    assert rollout.step(budget_ms=10**400).deadline_met


def test_a_model_without_canvas_goes_down_to_one_step(
    bundles: Callable[[str], Bundle], clip: np.ndarray
) -> None:
    predictor = canvasmar_rt.load(bundles("no-canvas").path)
    rollout = predictor.start(clip)
    rollout.warmup(deadlines=True)
    assert rollout.step(budget_ms=1e-6).ar_steps == 1
    # guidance of a canvas that is not there is none, and no rung does without it
    plain = dataclasses.replace(predictor.sampling, temporal_guidance=1.0, canvas_guidance=1.5)
    rollout = predictor.start(clip, sampling=plain)
    rollout.warmup(deadlines=True)
    assert {rung.guided for rung in rollout.latency} == {False}
    assert len({(rung.ar_steps, rung.flow_steps) for rung in rollout.latency}) == len(
        rollout.latency
    )
    assert not rollout.step().guided


@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
def test_a_level_of_groups_draws_what_a_rollout_of_its_own_would(
    bundles: Callable[[str], Bundle], clip: np.ndarray, engine: str
) -> None:
    """Every frame of a group has the order that its AR steps are drawn in."""
    predictor = canvasmar_rt.load(bundles("next-group").path, engine=engine)
    levels = ladder(predictor.sampling)
    assert {level.ar_steps for level in levels} == {3, 1}
    rollout = predictor.start(clip, seed=9)
    rollout.warmup(deadlines=True)
    for level, sampling in enumerate(levels):
        want = predictor.start(clip, seed=9, sampling=sampling).step()
        rollout.reset()
        got = rollout._step(None, level=level)
        np.testing.assert_array_equal(got.order, want.order)
        np.testing.assert_allclose(got.latent, want.latent, atol=1e-5)


def test_the_canvas_is_there_early(rollout: Rollout) -> None:
    seen: list[np.ndarray] = []
    p = rollout.step(on_canvas=seen.append)
    assert len(seen) == 1
    np.testing.assert_array_equal(seen[0], p.canvas_frames)
    assert np.abs(seen[0].astype(int) - p.frames).max() > 0
    assert list(p.timings).index("on_canvas") < len(p.timings) - 2
    assert p.timings["canvas_decoder"] > 0
    early = seen[0].copy()
    p = rollout.step(on_canvas=lambda frames: frames.fill(0))
    assert p.canvas_frames is not None
    assert p.canvas_frames.any()
    np.testing.assert_array_equal(seen[0], early)


def test_a_slow_look_makes_no_slow_machine(rollout: Rollout) -> None:
    """Its time is taken from the budget once, and says nothing of how long frames take."""
    p = rollout.step(on_canvas=lambda frames: time.sleep(0.3))
    assert p.timings["on_canvas"] >= 0.3
    assert 0 < rollout._timed.lead < 0.3


def test_warming_up_leaves_the_video_alone(
    predictor: Predictor, rollout: Rollout, clip: np.ndarray
) -> None:
    other = predictor.start(clip, seed=9)
    for _ in range(4):
        np.testing.assert_array_equal(rollout.step().latent, other.step().latent)


def alone(predictor: Predictor, clip: np.ndarray, stream: int, clock: int) -> Rollout:
    return predictor.start(clip, seed=9, stream=stream, clock=clock)


def test_videos_come_and_go_in_a_batch(predictor: Predictor, clip: np.ndarray) -> None:
    """Each row is the video it would be alone, and a change of one leaves the others untouched."""
    shared, undisturbed = (predictor.start(clip, seed=9, batch=3) for _ in range(2))
    for _ in range(2):
        shared.step(), undisturbed.step()
    context = 1 + (len(clip) - 1) // predictor.config.autoencoder.temporal_compression
    newcomer = alone(predictor, clip[::-1].copy(), stream=77, clock=shared.frame - context)
    shared.seat(1, newcomer.state())
    for _ in range(5):
        got, other, want = shared.step(), undisturbed.step(), newcomer.step()
        np.testing.assert_array_equal(got.latent[[0, 2]], other.latent[[0, 2]])
        np.testing.assert_allclose(got.latent[1], want.latent[0], atol=1e-4)
        assert np.abs(got.latent[1] - other.latent[1]).max() > 0.1
    copied = predictor.start(clip, seed=9, batch=3)
    copied.restore(shared.state())
    np.testing.assert_array_equal(copied.step().latent, shared.step().latent)
    fork = shared.fork(2, streams=[0, 0, 77, 77, 2, 2])
    want = shared.step()
    np.testing.assert_allclose(fork.step().latent[::2], want.latent, atol=1e-4)


def test_a_newcomer_among_predictions_is_not_observed(
    predictor: Predictor, clip: np.ndarray
) -> None:
    """It would lose the last frame of its context to what replaces the others' prediction."""
    shared = predictor.start(clip, seed=9, batch=2)
    shared.step()
    newcomer = predictor.start(clip, seed=9, stream=7, clock=1)
    shared.seat(1, newcomer.state())
    real = np.stack([clip[-predictor.config.autoencoder.temporal_compression :]] * 2)
    copied = predictor.start(clip, seed=9, batch=2)
    copied.restore(shared.state())
    for rollout in (shared, copied):
        with pytest.raises(StateError, match="seated between a step and its observation"):
            rollout.observe(real)
    fresh = predictor.start(clip, seed=9, batch=2)
    fresh.seat(1, predictor.start(clip, seed=9, stream=7).state())
    fresh.observe(real)


def test_levels_an_engine_refuses_leave_the_rollout_as_it_was(
    predictor: Predictor, clip: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout = predictor.start(clip, seed=9)

    def refuse(*_: object) -> None:
        raise EngineError("flow: the engine takes other shapes")

    program = rollout._program
    last = "_bind_branches" if hasattr(program, "_bind_branches") else "_constants"
    with monkeypatch.context() as engine:
        engine.setattr(program, last, refuse)
        with pytest.raises(EngineError, match="other shapes"):
            rollout.warmup(deadlines=True)
    rollout.warmup()
    want = predictor.start(clip, seed=9).step().latent
    np.testing.assert_array_equal(rollout.step().latent, want)


def test_the_clock_does_not_matter_to_what_was_seen(predictor: Predictor, clip: np.ndarray) -> None:
    """Times enter the model by their differences: the canvas, before any noise of the frame's own
    order, is the same as late as a clock may be."""
    quiet = dataclasses.replace(predictor.sampling, frame_noise=0.0, canvas_noise=0.0)
    most = LATEST - 1
    early, late = (predictor.start(clip, sampling=quiet, clock=t).step() for t in (0, most))
    assert late.frame == most + early.frame
    np.testing.assert_allclose(late.canvas, early.canvas, atol=1e-4)


def test_a_seat_that_does_not_fit_is_refused(predictor: Predictor, clip: np.ndarray) -> None:
    shared = predictor.start(clip, seed=9, batch=2)
    before = shared.state()
    with pytest.raises(StateError, match="at frame"):
        shared.seat(0, alone(predictor, clip, 0, clock=5).state())
    with pytest.raises(StateError, match="seed 8"):
        shared.seat(0, predictor.start(clip, seed=8).state())
    with pytest.raises(StateError, match="batch size, 2 videos, not of 1"):
        shared.seat(0, before)
    with pytest.raises(InputError, match="row 2"):
        shared.seat(2, alone(predictor, clip, 0, clock=0).state())
    with pytest.raises(StateError, match="at least one latent frame"):
        shared.seat(0, predictor.start(seed=9, clock=shared.frame).state())
    for clock in (-1, 2**63, 0.5):
        with pytest.raises(ConfigError, match="no more latent frames than the batch"):
            predictor.start(clip, clock=clock)  # type: ignore[arg-type]
    for name, values in shared.state().arrays.items():
        np.testing.assert_array_equal(values, before.arrays[name])


def test_what_the_choice_came_after_is_taken_from_the_budget(
    rollout: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadlines, left = rollout._deadlines, list[float]()
    assert deadlines is not None
    monkeypatch.setattr(deadlines, "choose", lambda seconds, **_: left.append(seconds) or 0)
    p = rollout.step(budget_ms=60_000, on_canvas=lambda _: time.sleep(0.3))
    assert left[0] <= 59.7
    assert p.deadline_met
    p = rollout.step(budget_ms=299, on_canvas=lambda _: time.sleep(0.3))
    assert not p.deadline_met  # though what came after the choice would have fitted


def test_frames_with_a_budget_correct_the_table(
    rollout: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, Timed]] = []
    monkeypatch.setattr(rollout._deadlines, "record", lambda *frame: told.append(frame))
    rollout.step()
    assert not told
    rollout.step(budget_ms=60_000)
    assert told == [(0, rollout._timed)]


def test_the_first_frame_from_nothing_needs_no_canvas(predictor: Predictor) -> None:
    """However little time there is."""
    rollout = predictor.start(seed=9)
    rollout.step()
    rollout.warmup(deadlines=True)
    rollout.reset()
    p = rollout.step(budget_ms=1e-6)
    assert (p.ar_steps, p.canvas, p.deadline_met) == (1, None, False)
    assert rollout.step(budget_ms=1e-6).ar_steps == 0


def test_a_newcomer_that_no_encoder_followed_is_not_observed(
    predictor: Predictor, clip: np.ndarray
) -> None:
    shared = predictor.start(clip[:3], seed=9, batch=2)
    newcomer = predictor.start(clip[:1], seed=9, stream=7)
    newcomer.observe_latent(np.zeros((1, 16, 4), np.float32))
    shared.seat(1, newcomer.state())
    with pytest.raises(StateError, match="encoder"):
        shared.observe(clip[:2])


def test_copies_of_a_video_began_when_it_began(predictor: Predictor, clip: np.ndarray) -> None:
    shared = predictor.start(clip, seed=9, batch=2)
    shared.step()
    shared.seat(1, predictor.start(clip, seed=9, stream=7, clock=1).state())
    assert shared.state().since == (0, 1)
    assert shared.fork(2).state().since == (0, 0, 1, 1)


def test_a_video_that_has_not_begun_is_not_seated(predictor: Predictor, clip: np.ndarray) -> None:
    shared = predictor.start(clip, seed=9, batch=2)
    with pytest.raises(StateError, match="at least one latent frame"):
        shared.seat(0, predictor.start(seed=9, clock=shared.frame).state())


def test_from_nothing_no_canvas_guides(predictor: Predictor) -> None:
    sampling = dataclasses.replace(predictor.sampling, temporal_guidance=1.0, canvas_guidance=1.5)
    rollout = predictor.start(sampling=sampling)
    assert [rollout.step().guided for _ in range(2)] == [False, True]


def test_a_canvas_that_is_not_finite_is_an_error(rollout: Rollout) -> None:
    level: Any = rollout._program._levels[0].fixed["frame_noise_level"]  # type: ignore[attr-defined]
    getattr(level, "host", level).fill(np.nan) if hasattr(level, "host") else level.fill_(np.nan)
    with pytest.raises(EngineError, match=r"canvas: .*not finite.*verify"):
        rollout.step()


def test_a_latent_that_is_not_finite_is_an_error(rollout: Rollout) -> None:
    level: Any = rollout._program._levels[0].fixed["canvas_noise_level"]  # type: ignore[attr-defined]
    level.host.fill(np.nan) if hasattr(level, "host") else level.fill_(np.nan)
    with pytest.raises(EngineError, match=r"flow: .*not finite.*verify"):
        rollout.step()


def test_a_slow_machine_is_not_held_up_on_top() -> None:
    table = deadlines()
    for _ in range(HICCUP_FRAMES + 8):
        table.record(0, Timed(0.01, 0.08))
    assert table.pace == pytest.approx(2.0)
    assert table.hiccup == pytest.approx(0.0)


def test_the_table_tells_what_one_frame_in_a_hundred_takes() -> None:
    rests = [0.04 + 0.0001 * i for i in range(101)]
    table = Deadlines(LEVELS, [[Timed(0.005, rest) for rest in rests]] * 3).table
    assert (table[0].p50_ms, table[0].p99_ms) == (pytest.approx(50.0), pytest.approx(54.9))


def test_a_machine_that_gets_faster_owes_no_time() -> None:
    rows = [[Timed(0.005, rest)] * 4 for rest in (0.04, 0.02, 0.01)]
    table = Deadlines(LEVELS, rows)
    for i in range(HICCUP_FRAMES):
        table.record(0, Timed(0.005, 0.04 * 0.99**i))
    assert table.hiccup == 0.0


def test_a_hiccup_is_one_that_was_seen() -> None:
    rows = [[Timed(0.005, rest)] * 4 for rest in (0.04, 0.02, 0.01)]
    table = Deadlines(LEVELS, rows)
    for i in range(HICCUP_FRAMES):
        table.record(0, Timed(0.005, 0.14 if i == 10 else 0.04))
    assert table.hiccup == pytest.approx(0.0, abs=1e-9)  # one in 64 is no trend
