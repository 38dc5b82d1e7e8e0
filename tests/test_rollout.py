"""The rollout's own promises: forks, replays, observation, guidance, memory, input checks."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import pickle
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import canvasmar_rt
from canvasmar_rt.bundle import Bundle
from canvasmar_rt.config import SamplingConfig
from canvasmar_rt.engines.component_program import ComponentProgram
from canvasmar_rt.engines.program import Noise, NoiseAhead, NoiseKey
from canvasmar_rt.errors import (
    CanvasMarError,
    ConfigError,
    EngineError,
    InputError,
    StateError,
)
from canvasmar_rt.rollout import Predictor, Rollout


@pytest.fixture(scope="module")
def predictor(bundles: Callable[[str], Bundle]) -> Predictor:
    return canvasmar_rt.load(bundles("expert").path)


@pytest.fixture
def rollout(predictor: Predictor, clip: np.ndarray) -> Rollout:
    return predictor.start(clip, seed=9)


def latents(rollout: Rollout, count: int) -> np.ndarray:
    return np.stack([rollout.step().latent for _ in range(count)])


def program(rollout: Rollout) -> ComponentProgram:
    assert isinstance(rollout._program, ComponentProgram)
    return rollout._program


def test_same_seed_same_video_and_another_seed_another(
    predictor: Predictor, clip: np.ndarray
) -> None:
    a, b, c = (latents(predictor.start(clip, seed=s), 4) for s in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 0.1


def test_reset_goes_back_to_the_start(rollout: Rollout) -> None:
    first = latents(rollout, 5)
    rollout.reset()
    np.testing.assert_array_equal(latents(rollout, 5), first)
    rollout.reset(seed=10)
    assert np.abs(latents(rollout, 5) - first).max() > 0.1
    rollout.reset(seed=9)
    np.testing.assert_array_equal(latents(rollout, 5), first)


def test_restore_continues_bit_for_bit(rollout: Rollout) -> None:
    rollout.step()
    kept = rollout.state()
    want = latents(rollout, 6)
    rollout.restore(kept)
    np.testing.assert_array_equal(latents(rollout, 6), want)


def test_state_is_a_copy(rollout: Rollout) -> None:
    kept = rollout.state()
    before = {k: v.copy() for k, v in kept.arrays.items()}
    latents(rollout, 4)
    for name, array in kept.arrays.items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)


def test_fork_replays_and_branches(rollout: Rollout) -> None:
    """The first copy of a fork does what the parent will do; the others do something else."""
    rollout.step()
    forked = rollout.fork(3)
    assert forked.batch == 3
    futures = latents(forked, 5)
    own = latents(rollout, 5)
    np.testing.assert_allclose(futures[:, 0], own[:, 0], atol=1e-5)
    for j in (1, 2):
        assert np.abs(futures[:, j] - own[:, 0]).max() > 0.1
    again = latents(rollout.fork(1), 3)
    np.testing.assert_array_equal(again, latents(rollout, 3))


def test_fork_of_a_batch_continues_every_row(predictor: Predictor, clip: np.ndarray) -> None:
    rollout = predictor.start(np.stack([clip, clip[::-1]]), seed=2, batch=2)
    rollout.step()
    forked = rollout.fork(2)
    futures, own = latents(forked, 4), latents(rollout, 4)
    np.testing.assert_allclose(futures[:, [0, 2]], own, atol=1e-5)


def test_many_forks_and_rewinds_are_bit_equal(rollout: Rollout) -> None:
    rollout.step()
    kept = rollout.state()
    want = rollout.step().latent
    futures = None
    for i in range(1000):
        rollout.restore(kept)
        futures = rollout.fork(1, into=futures if i % 50 else None)
        np.testing.assert_array_equal(futures.step().latent, want)


def test_observing_its_own_latent_changes_nothing(predictor: Predictor, clip: np.ndarray) -> None:
    plain, told = predictor.start(clip, seed=5), predictor.start(clip, seed=5)
    for _ in range(6):
        a, b = plain.step(), told.step()
        np.testing.assert_array_equal(a.latent, b.latent)
        np.testing.assert_array_equal(a.frames, b.frames)
        told.observe_latent(b.latent)


def test_observing_real_frames_equals_starting_from_them(
    predictor: Predictor, clip: np.ndarray
) -> None:
    """Told of frames one group at a time, with or without predicting them first, a rollout goes
    on as if it had started from the longer clip."""
    rng = np.random.default_rng(1)
    actions = rng.standard_normal((3, 4)).astype(np.float32)
    whole = predictor.start(clip, seed=3, actions=actions)
    told = predictor.start(clip[:1], seed=3)
    mixed = predictor.start(clip[:1], seed=3)
    for i in range(3):
        group = clip[1 + 2 * i : 3 + 2 * i]
        told.observe(group, actions[i])
        mixed.step(actions[i])
        mixed.observe(group)
    want = latents(whole, 4)
    np.testing.assert_array_equal(latents(told, 4), want)
    np.testing.assert_array_equal(latents(mixed, 4), want)


def test_observe_after_several_predictions_is_refused(rollout: Rollout, clip: np.ndarray) -> None:
    rollout.step()
    rollout.step()
    with pytest.raises(StateError, match=r"2 latent frames.*fork"):
        rollout.observe(clip[:2])


def test_observe_refuses_a_second_action(rollout: Rollout, clip: np.ndarray) -> None:
    rollout.step()
    with pytest.raises(InputError, match="told with that step, or not at all; leave it out"):
        rollout.observe(clip[:2], np.zeros(4, np.float32))
    rollout.observe(clip[:2])  # and nothing was lost


def test_observe_needs_an_encoder_that_saw_the_video(
    predictor: Predictor, clip: np.ndarray
) -> None:
    rollout = predictor.start()
    with pytest.raises(StateError, match="encoder"):
        rollout.observe(clip[:2])


def test_guidance_of_one_is_a_single_branch(
    predictor: Predictor, clip: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With w_t = w_s = 1 one branch is computed, and it equals all three with weights 0, 0, 1."""
    import canvasmar_rt.schedule as module
    from canvasmar_rt.schedule import Branches

    sampling = dataclasses.replace(predictor.sampling, temporal_guidance=1.0, canvas_guidance=1.0)
    single = predictor.start(clip, sampling=sampling)
    want = latents(single, 3)
    whole = Branches(
        temporal_on=np.array([0, 1, 1], np.float32),
        canvas_on=np.array([0, 0, 1], np.float32),
        weight=np.array([0, 0, 1], np.float32),
    )
    assert program(single)._levels[0].branches[True].buffers["branch_weight"].shape == (1,)
    monkeypatch.setattr(module, "guidance_branches", lambda *a, **k: whole)
    np.testing.assert_allclose(
        latents(predictor.start(clip, sampling=sampling), 3), want, atol=1e-5
    )


def test_guidance_steps_and_solver_matter(predictor: Predictor, clip: np.ndarray) -> None:
    base = latents(predictor.start(clip), 2)
    for change in (
        {"canvas_guidance": 3.0},
        {"temporal_guidance": 3.0},
        {"ar_steps": 2},
        {"flow_steps": 9},
        {"solver": "heun"},
        {"order": "random"},
        {"frame_noise": 0.0},
        {"canvas_noise": 0.0},
    ):
        sampling = dataclasses.replace(predictor.sampling, **change)
        assert np.abs(latents(predictor.start(clip, sampling=sampling), 2) - base).max() > 1e-3


def test_actions_matter(predictor: Predictor, clip: np.ndarray) -> None:
    def run(action: object) -> np.ndarray:
        return predictor.start(clip).step(action).latent  # type: ignore[arg-type]

    none, zero, one = run(None), run([0, 0, 0, 0]), run(np.ones(4, np.float32))
    assert np.abs(none - zero).max() > 1e-3
    assert np.abs(zero - one).max() > 1e-3


def test_every_token_alone_and_all_at_once(predictor: Predictor, clip: np.ndarray) -> None:
    for steps in (1, 16):
        sampling = dataclasses.replace(predictor.sampling, ar_steps=steps)
        prediction = predictor.start(clip, sampling=sampling).step()
        assert sorted(prediction.order[0]) == list(range(16))
        assert np.isfinite(prediction.latent).all()
    with pytest.raises(ConfigError, match=r"1\.\.16"):
        predictor.start(clip, sampling=dataclasses.replace(predictor.sampling, ar_steps=17))


def test_prediction_describes_itself(rollout: Rollout) -> None:
    p = rollout.step(decode_canvas=True)
    assert p.frames.shape == (1, 2, 16, 16, 3)
    assert p.frames.dtype == np.uint8
    assert p.canvas_frames is not None
    assert p.canvas_frames.shape == p.frames.shape
    assert p.staticness is not None
    assert p.staticness.shape == (1, 4, 4)
    assert (p.staticness > 0).all()
    assert (p.staticness < 1).all()
    assert p.frame == 4
    parts = sum(v for k, v in p.timings.items() if k != "total")
    assert parts == pytest.approx(p.timings["total"])
    assert rollout.step().canvas_frames is None


def test_decoding_the_canvas_leaves_the_video_alone(predictor: Predictor, clip: np.ndarray) -> None:
    plain, shown = predictor.start(clip), predictor.start(clip)
    for _ in range(4):
        a, b = plain.step(), shown.step(decode_canvas=True)
        np.testing.assert_array_equal(a.frames, b.frames)


def test_predictions_belong_to_the_caller(rollout: Rollout) -> None:
    first = rollout.step()
    kept = first.frames.copy(), first.latent.copy(), first.order.copy()
    rollout.step()
    for a, b in zip(kept, (first.frames, first.latent, first.order), strict=True):
        np.testing.assert_array_equal(a, b)


def test_from_nothing_begins_with_one_pixel_frame(predictor: Predictor) -> None:
    rollout = predictor.start(batch=2)
    first, second = rollout.step(), rollout.step()
    assert first.frames.shape == (2, 1, 16, 16, 3)
    assert first.canvas is None
    assert second.frames.shape == (2, 2, 16, 16, 3)
    assert second.canvas is not None


def test_buffers_never_move(rollout: Rollout) -> None:
    """Nothing is allocated anew from frame to frame: every buffer stays where it is."""

    def addresses() -> dict[str, int]:
        return {n: x.host.ctypes.data for n, x in program(rollout)._state().items()}

    bound = {n: x.address for n, x in program(rollout)._state().items()}
    assert len(bound) > 10
    assert addresses() == bound
    latents(rollout, 8)  # even, so that the histories have changed sides and back
    assert addresses() == bound


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (np.zeros((4, 16, 16, 3), np.uint8), r"1 \+ n\*2 frames.*got 4, give 3 or 5"),
        (np.zeros((3, 16, 16, 3), np.float32), "float32"),
        (np.zeros((3, 8, 16, 3), np.uint8), r"\(T, 16, 16, 3\).*\(3, 8, 16, 3\)"),
        (np.zeros((3, 16, 16, 4), np.uint8), r"16, 4"),
        (np.zeros((2, 3, 16, 16, 3), np.uint8), "1 or no videos"),
        (np.zeros((0, 16, 16, 3), np.uint8), r"\(0, 16"),
        (np.zeros((16, 16, 3), np.uint8), r"\(16, 16, 3\)"),
    ],
    ids=["count", "dtype", "size", "channels", "batch", "empty", "rank"],
)
def test_bad_context_is_one_clear_error(
    predictor: Predictor, context: np.ndarray, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        predictor.start(context, batch=1)


def test_bad_actions_are_one_clear_error(
    predictor: Predictor, rollout: Rollout, bundles: Callable[[str], Bundle], clip: np.ndarray
) -> None:
    with pytest.raises(InputError, match=r"\(4,\) or \(1, 4\), got \(3,\)"):
        rollout.step([1, 2, 3])
    with pytest.raises(InputError, match="not finite"):
        rollout.step([1, 2, 3, float("nan")])
    with pytest.raises(InputError, match="expected numbers"):
        rollout.step(["a"] * 4)  # type: ignore[list-item]
    with pytest.raises(InputError, match=r"actions: .*not finite"):
        predictor.start(clip, actions=np.full((3, 4), np.nan, np.float32))
    with pytest.raises(InputError, match=r"latent: .*not finite"):
        rollout.observe_latent(np.full((1, 16, 4), np.inf, np.float32))
    with pytest.raises(InputError, match=r"\(3, 4\)"):
        predictor.start(clip, actions=np.zeros((2, 4), np.float32))
    with pytest.raises(InputError, match="no context"):
        predictor.start(actions=np.zeros((2, 4), np.float32))
    actionless = canvasmar_rt.load(bundles("mmdit").path)
    with pytest.raises(InputError, match="takes none"):
        actionless.start(clip).step([1, 2, 3, 4])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"batch": 33}, "batch 33 .*1..32.*--batch-max"),
        ({"batch": 2.0}, "batch must be an integer"),
        ({"stream": 0.5}, "integers"),
        ({"seed": 1.5}, "integers"),
        ({"seed": -1}, "seed"),
        ({"stream": 2**64}, "stream"),
    ],
)
def test_bad_start_is_one_clear_error(
    predictor: Predictor, arguments: dict[str, int], message: str
) -> None:
    with pytest.raises(CanvasMarError, match=message):
        predictor.start(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("sampling", [{}, 0, "", {"ar_steps": 2}])
def test_sampling_of_another_kind_is_refused(predictor: Predictor, sampling: Any) -> None:
    with pytest.raises(ConfigError, match="sampling must be a SamplingConfig"):
        predictor.start(sampling=sampling)


class Busy:
    """A program as on a GPU: it always has time for something else meanwhile."""

    def __init__(self, program: Any) -> None:
        self._program, self.drawn = program, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._program, name)

    def predict(self, *arguments: Any, meanwhile: Callable[[], None], **options: Any) -> Any:
        made = self._program.predict(*arguments, meanwhile=meanwhile, **options)
        meanwhile()
        self.drawn += 1
        return made


@pytest.mark.parametrize("change", ["nothing", "restore", "seed", "seat", "fade"])
def test_noise_that_was_drawn_ahead_is_the_same_noise(
    predictor: Predictor, clip: np.ndarray, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    draw = NoiseKey.draw

    def watched(key: NoiseKey, into: Any) -> None:
        drawn.append(key.frame)
        draw(key, into)

    monkeypatch.setattr(NoiseKey, "draw", watched)
    sampling = predictor.sampling
    if change == "fade":  # the flow's noise changes from frame to frame
        sampling = dataclasses.replace(sampling, flow_temperature=(1.0, 0.5), temperature_frames=4)

    def film(busy: bool) -> list[np.ndarray]:
        rollout = predictor.start(clip, batch=2, seed=3, sampling=sampling)
        if busy:
            rollout._program = Busy(rollout._program)
        start = rollout.state()
        made = [rollout.step().latent for _ in range(3)]
        if change == "restore":
            rollout.restore(start)
        elif change == "seed":
            rollout.reset(seed=4)
        elif change == "seat":
            one = predictor.start(clip, seed=3, stream=9, clock=rollout.frame - 4)
            rollout.seat(1, one.state())
        return made + [rollout.step().latent for _ in range(3)]

    plain = film(busy=False)
    serial = len(drawn)
    np.testing.assert_array_equal(film(busy=True), plain)
    # six frames, each drawn ahead of the one before but the first; again where all changed
    anew = change in ("restore", "seed", "seat")
    assert len(drawn) - serial == serial + 1 + anew


def test_no_two_futures_share_their_noise(predictor: Predictor, clip: np.ndarray) -> None:
    rollout = predictor.start(clip, batch=3)
    assert rollout.fork(2).state().streams == (0, 3, 1, 4, 2, 5)
    rollout.seat(1, predictor.start(clip, stream=4).state())
    streams = rollout.fork(3).state().streams
    assert streams == (0, 5, 10, 4, 9, 14, 2, 7, 12)
    assert len(set(streams)) == 9
    last = predictor.start(clip, stream=2**64 - 1)
    with pytest.raises(ConfigError, match=r"would draw from streams up to .* choose"):
        last.fork(2)
    assert last.fork(2, streams=[2**64 - 1, 0]).batch == 2
    with pytest.raises(ConfigError, match="2 videos from 18446744073709551615 on go past"):
        predictor.start(clip, batch=np.int64(2), stream=2**64 - 1)  # type: ignore[arg-type]


def test_fork_and_restore_refuse_what_does_not_fit(rollout: Rollout, predictor: Predictor) -> None:
    with pytest.raises(InputError, match="33 futures"):
        rollout.fork(33)
    with pytest.raises(InputError, match="expected 2 streams"):
        rollout.fork(2, streams=[1])
    with pytest.raises(InputError, match="expected 2 streams"):
        rollout.fork(2, streams=[[1], [1, 2]])  # type: ignore[list-item]
    with pytest.raises(StateError, match="another batch"):
        rollout.restore(predictor.start(batch=2).state())
    with pytest.raises(InputError, match=r"2\.0 futures"):
        rollout.fork(2.0)  # type: ignore[arg-type]
    again = rollout.fork(2)
    before = latents(rollout.fork(2), 2)
    for streams in ([-1, 3], [1.5, 3]):
        with pytest.raises(ConfigError, match="fork: streams"):
            rollout.fork(2, streams=streams, into=again)  # type: ignore[arg-type]
    with pytest.raises(StateError, match="not the rollout itself"):
        rollout.fork(1, into=rollout)
    np.testing.assert_array_equal(latents(again, 2), before)


def test_an_engine_that_returns_nan_is_an_error(predictor: Predictor, clip: np.ndarray) -> None:
    """A miscompiled engine must not quietly poison the video."""
    rollout = predictor.start(clip)
    program(rollout)._levels[0].fixed["canvas_noise_level"].host.fill(np.nan)
    with pytest.raises(EngineError, match=r"flow: .*not finite.*verify"):
        rollout.step()


def test_a_failed_step_is_not_built_upon(rollout: Rollout) -> None:
    """Half a frame is never continued; going back makes the rollout usable again."""
    kept = rollout.state()
    want = latents(rollout, 3)
    rollout.restore(kept)
    good = program(rollout)._backs.copy()
    program(rollout)._backs.update(dict.fromkeys(good, _raise))
    with pytest.raises(KeyboardInterrupt):
        rollout.step()
    program(rollout)._backs.update(good)
    for call in (rollout.step, rollout.state, rollout.fork):
        with pytest.raises(StateError, match="restore"):
            call()
    rollout.restore(kept)
    np.testing.assert_array_equal(latents(rollout, 3), want)


def _raise(clock: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("call", ["restore", "reset", "seat", "fork", "warmup", "deadlines"])
def test_any_change_that_is_cut_off_is_not_built_upon(
    call: str, predictor: Predictor, clip: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was under way: half of two states is never continued."""
    rollout = predictor.start(clip, seed=9)
    want = latents(rollout.fork(), 3)
    kept = rollout.state()
    another = rollout.fork()
    another.step()
    rollout.step()
    newcomer = predictor.start(clip, seed=9, stream=4, clock=1).state()
    calls: dict[str, Callable[[], object]] = {
        "restore": lambda: rollout.restore(kept),
        "reset": lambda: rollout.reset(seed=3),
        "seat": lambda: rollout.seat(0, newcomer),
        "fork": lambda: another.fork(into=rollout),
        "warmup": rollout.warmup,
        "deadlines": lambda: rollout.warmup(deadlines=True),
    }
    load = ComponentProgram.load

    def cut_off(self: ComponentProgram, *args: object) -> None:
        load(self, *args)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ComponentProgram, "load", cut_off)
        with pytest.raises(KeyboardInterrupt):
            calls[call]()
    with pytest.raises(StateError, match="restore"):
        rollout.step()
    rollout.restore(kept)
    np.testing.assert_array_equal(latents(rollout, 3), want)


def test_a_ladder_that_was_cut_off_is_made_whole(
    rollout: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, made = ComponentProgram.add_level, []

    def cut_off(self: ComponentProgram, sampling: SamplingConfig) -> None:
        add(self, sampling)
        made.append(sampling)
        if len(made) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(ComponentProgram, "add_level", cut_off)
    with pytest.raises(KeyboardInterrupt):
        rollout.warmup(deadlines=True)
    rollout.reset()
    rollout.warmup(deadlines=True)
    rungs = [level for level in rollout._levels if level is not None]
    assert len(rungs) > 2
    assert made == rungs[1:]
    assert program(rollout).levels == len(rungs)


def test_a_call_in_the_middle_of_another_changes_nothing(rollout: Rollout) -> None:
    kept = rollout.state()
    other = rollout.fork()
    want = latents(rollout, 2)
    rollout.restore(kept)
    refused = []

    def meanwhile(_: np.ndarray) -> None:
        calls = (rollout.step, rollout.state, rollout.reset, rollout.fork, rollout.warmup,
                 lambda: rollout.restore(kept))  # fmt: skip
        for call in calls:
            with pytest.raises(StateError, match="in the middle of another call"):
                call()
            refused.append(call)
        with pytest.raises(StateError, match="fork: `into` is in the middle of a call"):
            other.fork(into=rollout)

    found = [rollout.step(on_canvas=meanwhile).latent for _ in range(2)]
    assert len(refused) == 12
    np.testing.assert_array_equal(found, want)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
def test_a_signal_never_leaves_a_rollout_in_the_middle_of_a_call(rollout: Rollout) -> None:
    class Alarm(Exception):
        pass

    def ring(signum: int, frame: object) -> None:
        raise Alarm

    def call_until_it_rings(delay: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, delay)
        while True:
            with contextlib.suppress(InputError):
                rollout.seat(5, state)  # refused at once, so most of it is the entrance

    state, random = rollout.state(), np.random.default_rng(0)
    before = signal.signal(signal.SIGALRM, ring)
    try:
        for delay in random.uniform(1e-5, 2e-4, 500).tolist():
            with pytest.raises(Alarm):
                call_until_it_rings(delay)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert np.isfinite(rollout.step().latent).all()


def test_numbers_of_numpy_are_numbers(predictor: Predictor, clip: np.ndarray) -> None:
    small = predictor.start(
        clip, seed=np.uint8(9), stream=np.uint8(250), batch=np.int8(8), clock=np.int8(3)
    )
    large = predictor.start(clip, seed=9, stream=250, batch=8, clock=3)
    for rollout in (small, large):
        rollout.step()
    few = small.fork(np.int8(2))
    assert few._streams == large.fork(2)._streams
    assert {type(n) for n in (*few._streams, small.seed, small.frame)} == {int}
    prediction = small.step()
    json.dumps(prediction.frame)
    np.testing.assert_array_equal(prediction.latent, large.step().latent)
    assert canvasmar_rt.load(predictor.bundle.path, threads=np.int64(1))


class Policy:
    """What a policy network returns, as NumPy finds it."""

    def __array__(self, *_: object, **__: object) -> np.ndarray:
        raise RuntimeError("Can't call numpy() on Tensor that requires grad.")


class Half:
    """What NumPy finds of a tensor that it has no numbers for, or that is on a GPU."""

    def __array__(self, *_: object, **__: object) -> np.ndarray:
        raise TypeError("Got unsupported ScalarType BFloat16")


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_rollout_is_copied_by_fork_alone(rollout: Rollout, make: Callable[..., Any]) -> None:
    with pytest.raises(StateError, match=r"fork\(\) makes another one"):
        make(rollout)
    with pytest.raises(StateError, match=r"another process calls load\(\) itself"):
        make(rollout.predictor)


def test_other_things_than_were_asked_for_are_one_clear_error(
    rollout: Rollout, predictor: Predictor, clip: np.ndarray
) -> None:
    other: Any = None
    wrong: list[tuple[Callable[[], object], type[CanvasMarError], str]] = [
        (lambda: predictor.start(clip, sampling="fast"), ConfigError, "a SamplingConfig"),
        (
            lambda: predictor.start([clip, clip[:3]]),
            InputError,
            "context: expected an array of frames",
        ),
        (lambda: rollout.restore(other), InputError, r"expected a state from state\(\)"),
        (lambda: rollout.fork(into=3), InputError, "`into` is an earlier fork, got int"),
        (lambda: rollout.fork(streams=5), InputError, "expected 1 streams, got 5"),
        (lambda: rollout.fork(into=predictor.start(clip, batch=2)), StateError, "fork: `into`"),
        (lambda: rollout.seat("0", rollout.state()), InputError, "the number of a row, got '0'"),
        (lambda: rollout.seat(True, rollout.state()), InputError, "number of a row, got True"),
        (lambda: rollout.step(on_canvas=3), InputError, "expected a function of the frames"),
        (lambda: rollout.step([1j] * 4), InputError, "expected numbers .got complex128"),
        (lambda: rollout.step(["0.1"] * 4), InputError, "action: expected numbers"),
        (lambda: rollout.step(np.full(4, 1e300)), InputError, "not finite"),
        (lambda: rollout.step(Policy()), InputError, "action: expected numbers .*requires grad"),
        (lambda: rollout.observe_latent(Policy()), InputError, "latent: .*requires grad"),
        (lambda: rollout.observe_latent([[0.0], []]), InputError, "latent: expected an array"),
        (lambda: rollout.observe(Half()), InputError, "frames: .*BFloat16"),
        (lambda: canvasmar_rt.load("toytable-int8", device="gpu"), EngineError, "no device 'gpu'"),
        (lambda: canvasmar_rt.load("toytable", device=other), EngineError, "no device None"),
    ]  # type: ignore[arg-type]
    before = rollout.state()
    assert rollout.state() != before
    assert before in {before}
    for call, kind, reason in wrong:
        with pytest.raises(kind, match=reason):
            call()
    wide = {k: v.astype(np.float64) for k, v in before.arrays.items()}
    with pytest.raises(StateError, match="not the arrays of a state"):
        rollout.restore(dataclasses.replace(before, arrays=wide))
    for name, array in rollout.state().arrays.items():
        np.testing.assert_array_equal(array, before.arrays[name])


def test_a_state_from_a_file_has_numbers_that_stay(rollout: Rollout) -> None:
    """What np.load gives for a number is an array, which a step would count on."""
    before = rollout.state()
    assert pickle.loads(pickle.dumps(before)).time == before.time
    wrong: list[dict[str, Any]] = [
        {"time": np.array(before.time)},
        {"seed": np.array(before.seed)},
        {"unobserved": "0"},
        {"streams": ("0",)},
        {"since": (0, 0)},
    ]
    for change in wrong:
        with pytest.raises(StateError, match="are integers, streams and since of 1; got"):
            rollout.restore(dataclasses.replace(before, **change))
    for change in ({"time": -5}, {"time": 2**63}, {"since": (before.time + 1,)}, {"since": (-1,)}):
        with pytest.raises(StateError, match="a video cannot begin with frame"):
            rollout.restore(dataclasses.replace(before, **change))
    for change in ({"seed": 2**70}, {"streams": (-1,)}):
        with pytest.raises(ConfigError, match="restore: seed and streams must be integers in"):
            rollout.restore(dataclasses.replace(before, **change))
    listed = {k: v.tolist() for k, v in before.arrays.items()}
    with pytest.raises(StateError, match="not the arrays of a state"):
        rollout.restore(dataclasses.replace(before, arrays=listed))
    want = latents(rollout, 2)
    loaded = {"time": np.int64(before.time), "since": np.array(before.since)}
    loaded["streams"] = np.array(before.streams)
    for _ in range(2):
        rollout.restore(dataclasses.replace(before, **loaded))
        assert type(rollout.frame) is int
        np.testing.assert_array_equal(latents(rollout, 2), want)


def test_a_fork_can_be_used_again(rollout: Rollout) -> None:
    first = rollout.fork(2)
    want = latents(first, 3)
    rollout.step()
    again = rollout.fork(2, into=first)
    assert again is first
    np.testing.assert_array_equal(latents(rollout.fork(2), 2), latents(again, 2))
    with pytest.raises(StateError, match="batch"):
        rollout.fork(3, into=first)
    assert want.shape == (3, 2, 16, 4)


def test_a_state_of_another_bundle_is_refused(
    rollout: Rollout, bundles: Callable[[str], Bundle]
) -> None:
    other = canvasmar_rt.load(bundles("mmdit").path).start()
    with pytest.raises(StateError, match="another bundle"):
        rollout.restore(other.state())


def test_a_reset_that_is_refused_changes_nothing(rollout: Rollout) -> None:
    with pytest.raises(ConfigError, match="seed"):
        rollout.reset(seed=-1)
    assert rollout.seed == 9


def test_the_batch_is_that_of_the_context(predictor: Predictor, clip: np.ndarray) -> None:
    assert predictor.start(np.stack([clip] * 3)).batch == 3
    assert predictor.start(clip).batch == 1


@pytest.mark.parametrize("threads", ["two", 1.5, 0, 100_000])
def test_threads_are_a_number_of_threads(threads: object) -> None:
    with pytest.raises(EngineError, match=r"threads must lie in 1\.\.1024"):
        canvasmar_rt.load("toytable", threads=threads)  # type: ignore[arg-type]


def test_latents_of_ones_own_are_not_followed_by_frames(rollout: Rollout, clip: np.ndarray) -> None:
    """The encoder has not seen the frames they stand for."""
    rollout.step()
    rollout.observe_latent(np.zeros((1, 16, 4), np.float32))
    with pytest.raises(StateError, match="encoder"):
        rollout.observe(clip[:2])


def test_what_the_encoder_saw_goes_with_the_state(
    predictor: Predictor, rollout: Rollout, clip: np.ndarray
) -> None:
    blind, kept = predictor.start(seed=9), rollout.state()
    blind.step()
    blind.observe_latent(np.zeros((1, 16, 4), np.float32))
    rollout.restore(blind.state())
    with pytest.raises(StateError, match="encoder"):
        rollout.observe(clip[:2])
    blind.restore(kept)
    blind.observe(clip[:2])


def test_a_fork_goes_back_to_where_it_was_forked_last(rollout: Rollout) -> None:
    futures = rollout.fork(2)
    rollout.step()
    again = rollout.fork(2, into=futures)
    want = again.step().latent
    again.reset()
    assert again.frame == rollout.frame
    np.testing.assert_array_equal(again.step().latent, want)


def test_a_fork_of_other_sampling_is_refused(predictor: Predictor, rollout: Rollout) -> None:
    other = dataclasses.replace(predictor.sampling, flow_steps=2)
    with pytest.raises(StateError, match="other sampling options"):
        rollout.fork(into=predictor.start(sampling=other))


def test_a_warm_up_that_fails_is_not_built_upon(
    rollout: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = Rollout._step, iter(range(100))

    def cut_off(self: Rollout, *args: Any, **options: Any) -> Any:
        made = step(self, *args, **options)
        if next(calls) == 3:
            raise KeyboardInterrupt  # between two frames
        return made

    with monkeypatch.context() as patch:
        patch.setattr(Rollout, "_step", cut_off)
        with pytest.raises(KeyboardInterrupt):
            rollout.warmup(deadlines=True)
    with pytest.raises(StateError, match="restore"):
        rollout.step()


def test_threads_are_those_asked_for(bundles: Callable[[str], Bundle]) -> None:
    engine: Any = canvasmar_rt.load(bundles("expert").path, threads=1).engine
    for name in ("flow", "spatial"):
        assert engine.session(name).get_session_options().intra_op_num_threads == 1


def test_pools_do_not_spin_between_graphs(bundles: Callable[[str], Bundle]) -> None:
    engine: Any = canvasmar_rt.load(bundles("expert").path).engine
    options = engine.session("flow").get_session_options()
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_noise_that_was_cut_off_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def empty() -> Noise:
        shape = (1, 4, 2)
        return Noise(
            **{k: np.zeros(shape, np.float32) for k in ("flow", "frame", "canvas", "order")}
        )

    key = NoiseKey(
        sampling=SamplingConfig(), seed=1, streams=(0,), since=(0,), frame=1, has_canvas=True
    )
    want = empty()
    key.draw(want)
    got = empty()
    ahead = NoiseAhead(got)
    ahead.draw(key)
    with monkeypatch.context() as patch:

        def cut_off(key: NoiseKey, into: Noise) -> None:
            into.flow[:] = 7.0
            raise KeyboardInterrupt

        patch.setattr(NoiseKey, "draw", cut_off)
        with pytest.raises(KeyboardInterrupt):
            ahead.draw(dataclasses.replace(key, frame=2))
    ahead.fill(key)  # as after going back
    np.testing.assert_array_equal(got.flow, want.flow)
