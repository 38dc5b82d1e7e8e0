"""A rollout that draws groups of J latent frames: what it promises beside `test_rollout`.

What a step computes is compared with the reference sampler in `engines/test_conformance`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import canvasmar_rt
from canvasmar_rt.bundle import Bundle
from canvasmar_rt.components import components
from canvasmar_rt.engines.torch_engine import load_model
from canvasmar_rt.errors import InputError, StateError
from canvasmar_rt.predict import PredictOptions, predict_clip
from canvasmar_rt.rollout import Prediction, Predictor, Rollout
from canvasmar_rt.verify import compare_rollout, verify
from tests.test_cli import run
from training.clips import Clips, latent_actions
from training.stages import continue_clips, group_actions

J, T, N, C, A = 3, 2, 16, 4, 6
"""Latent frames of a group, pixel frames of each, tokens, channels, numbers of an action."""


@pytest.fixture(scope="module")
def bundle(bundles: Callable[[str], Bundle]) -> Bundle:
    return bundles("next-group")


@pytest.fixture(scope="module")
def predictor(bundle: Bundle) -> Predictor:
    return canvasmar_rt.load(bundle.path, threads=1)


@pytest.fixture(scope="module", params=["onnxruntime", "torch"])
def either(bundle: Bundle, request: pytest.FixtureRequest) -> Predictor:
    return canvasmar_rt.load(bundle.path, engine=request.param, threads=1)


@pytest.fixture
def rollout(predictor: Predictor, clip: np.ndarray) -> Rollout:
    """At frame 4."""
    return predictor.start(clip, seed=9)


def latents(rollout: Rollout, count: int = 3) -> np.ndarray:
    return np.stack([rollout.step().latent for _ in range(count)])


def arrays(prediction: Prediction) -> dict[str, np.ndarray]:
    return {k: v for k, v in vars(prediction).items() if isinstance(v, np.ndarray)}


def assert_same(a: Prediction, b: Prediction) -> None:
    assert arrays(a).keys() == arrays(b).keys()
    for name, values in arrays(a).items():
        np.testing.assert_array_equal(values, arrays(b)[name], err_msg=name)


# -- what a prediction is


def layout(batch: int, pixels: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {
        "frames": ("uint8", (batch, pixels, 16, 16, 3)),
        "latent": ("float32", (batch, J, N, C)),
        "canvas": ("float32", (batch, J, N, C)),
        "canvas_frames": ("uint8", (batch, pixels, 16, 16, 3)),
        "staticness": ("float32", (batch, J, 4, 4)),
        "order": ("int64", (batch, J, N)),
    }


def test_a_prediction_is_a_group(either: Predictor, clip: np.ndarray) -> None:
    rollout = either.start(np.stack([clip, clip[::-1]]), seed=9)
    plain = either.start(np.stack([clip, clip[::-1]]), seed=9)
    for frame in (4, 7, 10):
        assert (rollout.frame, plain.frame) == (frame, frame)
        seen: list[np.ndarray] = []
        p = rollout.step(on_canvas=seen.append)
        assert p.frame == frame
        assert {k: (str(v.dtype), v.shape) for k, v in arrays(p).items()} == layout(2, J * T)
        ranks = np.broadcast_to(np.arange(N), p.order.shape)
        np.testing.assert_array_equal(np.sort(p.order, axis=-1), ranks)
        assert len({tuple(row) for row in p.order.reshape(-1, N).tolist()}) == 2 * J
        assert p.staticness is not None
        assert ((p.staticness > 0) & (p.staticness < 1)).all()
        for values in (p.latent, p.canvas, p.staticness, p.frames.reshape(2, J, -1)):
            assert all((values[:, j] != values[:, 0]).any() for j in (1, 2))
        (guess,) = seen
        np.testing.assert_array_equal(guess, p.canvas_frames)
        shown = sum(seconds for part, seconds in p.timings.items() if part != "total")
        assert shown == pytest.approx(p.timings["total"])
        other = plain.step()  # and showing the canvas leaves the video alone
        assert other.canvas_frames is None
        np.testing.assert_array_equal(other.frames, p.frames)
        np.testing.assert_array_equal(other.latent, p.latent)


def test_from_nothing_the_first_frame_is_one_pixel_frame(either: Predictor) -> None:
    rollout = either.start(batch=2)
    never: list[np.ndarray] = []
    first = rollout.step(decode_canvas=True, on_canvas=never.append)
    assert not never
    made = {k: (str(v.dtype), v.shape) for k, v in arrays(first).items()}
    alone = ("frames", "latent", "order")
    assert made == {k: v for k, v in layout(2, 1 + (J - 1) * T).items() if k in alone}
    second = rollout.step(decode_canvas=True)
    assert {k: (str(v.dtype), v.shape) for k, v in arrays(second).items()} == layout(2, J * T)
    assert (first.frame, second.frame, rollout.frame) == (0, J, 2 * J)


def test_rows_are_videos_of_their_own(either: Predictor, clip: np.ndarray) -> None:
    clips = np.stack([clip, clip[::-1]])
    together = either.start(clips, seed=4)
    alone = [either.start(c, seed=4, stream=b) for b, c in enumerate(clips)]
    for _ in range(3):
        both = together.step()
        for b, rollout in enumerate(alone):
            one = rollout.step()
            np.testing.assert_array_equal(one.order[0], both.order[b])
            np.testing.assert_allclose(one.latent[0], both.latent[b], atol=1e-4)
            assert np.abs(one.frames[0].astype(int) - both.frames[b]).max() <= 1
    assert np.abs(both.latent[0] - both.latent[1]).max() > 0.1


def test_predictions_belong_to_the_caller(either: Predictor, clip: np.ndarray) -> None:
    rollout, seen = either.start(clip), []
    first = rollout.step(on_canvas=seen.append)
    kept = {name: values.copy() for name, values in arrays(first).items()}
    rollout.step(on_canvas=seen.append)
    for name, values in arrays(first).items():
        np.testing.assert_array_equal(values, kept[name], err_msg=name)
    np.testing.assert_array_equal(seen[0], kept["canvas_frames"])


# -- going back, branching, changing seats


def test_going_back_continues_bit_for_bit(either: Predictor, clip: np.ndarray) -> None:
    rollout = either.start(clip, seed=9)
    rollout.step()
    kept, whole = rollout.state(), latents(rollout)
    rollout.restore(kept)
    assert rollout.frame == 7
    np.testing.assert_array_equal(latents(rollout), whole)
    rollout.reset()
    assert rollout.frame == 4
    np.testing.assert_array_equal(latents(rollout, 4)[1:], whole)
    rollout.restore(kept)
    futures = rollout.fork(2)
    got = latents(futures)
    np.testing.assert_allclose(got[:, 0], whole[:, 0], atol=1e-4)
    assert np.abs(got[:, 1] - whole[:, 0]).max() > 0.1
    np.testing.assert_array_equal(latents(rollout.fork()), whole)
    np.testing.assert_array_equal(latents(rollout), whole)


def test_videos_come_and_go_between_groups(predictor: Predictor, clip: np.ndarray) -> None:
    shared, undisturbed = (predictor.start(clip, seed=9, batch=2) for _ in range(2))
    shared.step(), undisturbed.step()
    newcomer = predictor.start(clip[::-1], seed=9, stream=77, clock=shared.frame - 4)
    shared.seat(1, newcomer.state())
    for _ in range(3):
        got, other, want = shared.step(), undisturbed.step(), newcomer.step()
        np.testing.assert_array_equal(got.latent[0], other.latent[0])
        np.testing.assert_allclose(got.latent[1], want.latent[0], atol=1e-4)
        assert np.abs(got.latent[1] - other.latent[1]).max() > 0.1
    late = predictor.start(clip, seed=9, clock=shared.frame - 5)
    with pytest.raises(StateError, match="at frame"):  # within a group there is no seat
        shared.seat(0, late.state())


# -- what really happened


def test_history_is_observed_frame_by_frame(either: Predictor, clip: np.ndarray) -> None:
    whole, told = either.start(clip, seed=3), either.start(clip[:1], seed=3)
    for i in range(3):
        told.observe(clip[1 + 2 * i : 3 + 2 * i])
        assert told.frame == 2 + i
    for _ in range(3):
        assert_same(told.step(decode_canvas=True), whole.step(decode_canvas=True))


def test_a_predicted_group_cannot_be_replaced(rollout: Rollout, clip: np.ndarray) -> None:
    """Its inner frames are in the history; what the error says to do works."""
    kept, undisturbed = rollout.state(), rollout.fork()
    rollout.fork(2).step()  # imagined on a fork, ...
    rollout.observe(clip[1:3])  # ... observed on the parent
    assert rollout.frame == 5
    rollout.restore(kept)
    rollout.step(), undisturbed.step()
    advice = r"3 latent frames were predicted since a real one.*fork\(\).*or start a new rollout"
    with pytest.raises(StateError, match=advice):
        rollout.observe(clip[1:3])
    with pytest.raises(StateError, match=advice):
        rollout.observe_latent(np.zeros((1, N, C), np.float32))
    np.testing.assert_array_equal(latents(rollout), latents(undisturbed))  # nothing was lost


# -- actions


def test_a_step_takes_the_actions_of_the_whole_group(either: Predictor, clip: np.ndarray) -> None:
    action = np.random.default_rng(0).standard_normal(A).astype(np.float32)

    def draw(action: object, batch: int = 2) -> np.ndarray:
        return either.start(clip, batch=batch).step(action).latent  # type: ignore[arg-type]

    one = draw(action)
    np.testing.assert_array_equal(draw(np.stack([action, action])), one)
    np.testing.assert_array_equal(draw(action.tolist()), one)
    mixed = draw(np.stack([action, np.zeros(A, np.float32)]))
    np.testing.assert_array_equal(mixed[0], one[0])
    np.testing.assert_array_equal(mixed[1], draw(np.zeros(A))[1])
    for other in [None, np.zeros(A), *(action + 3 * np.eye(A, dtype=np.float32)[[0, 2, 5]])]:
        assert (np.abs(draw(other) - one).max((0, 2, 3)) > 1e-3).all()  # in every frame


def test_actions_of_another_shape_are_one_clear_error(
    predictor: Predictor, rollout: Rollout, clip: np.ndarray
) -> None:
    for wrong in (np.zeros(2), np.zeros((J, 2)), np.zeros((2, A)), np.zeros((1, J, 2))):
        with pytest.raises(InputError, match=r"expected shape \(6,\) or \(1, 6\), got"):
            rollout.step(wrong)
    assert rollout.frame == 4
    for actions in (np.zeros((3, A), np.float32), np.zeros((3, 2), np.float32)):
        with pytest.raises(InputError, match=r"group of latent frames by step\(action\); leave"):
            predictor.start(clip, actions=actions)


# -- budgets


def test_a_group_is_there_in_time(either: Predictor, clip: np.ndarray) -> None:
    rollout, plain = (either.start(clip, seed=9) for _ in range(2))
    rollout.warmup(deadlines=True)
    assert_same(rollout.step(budget_ms=60_000), plain.step())
    p = rollout.step(budget_ms=1e-6, decode_canvas=True)
    assert (p.ar_steps, p.flow_steps, p.deadline_met) == (0, 0, False)
    assert (p.frame, rollout.frame, p.order.shape) == (7, 10, (1, J, 0))
    np.testing.assert_array_equal(p.latent, p.canvas)
    np.testing.assert_array_equal(p.frames, p.canvas_frames)
    follower = either.start(seed=9)
    follower.restore(rollout.state())
    assert_same(follower.step(), rollout.step())
    for level, rung in enumerate(rollout.latency[:-1]):
        rollout.reset()
        q = rollout._step(None, level=level)
        assert (q.ar_steps, q.latent.shape) == (rung.ar_steps, (1, J, N, C))
        assert (np.abs(q.latent - p.canvas).max((0, 2, 3)) > 1e-3).all()


# -- the bundle


def test_the_certificate_holds_for_groups(either: Predictor) -> None:
    report = verify(either.bundle.path, engine=either.engine.name, threads=1)
    assert set(report["components"]) == set(components(either.config))
    assert "split" in report["components"]
    assert "frame" not in report["components"]
    assert len(report["drift"]) == math.ceil(32 / J)
    assert max(report["drift"]) < 1e-3
    assert report["flipped_orders"] == 0


def test_a_golden_order_is_forced_on_every_frame_of_a_group(either: Predictor) -> None:
    """Where the certificate's order is not the engine's own, it is followed all the same."""
    rng, rollout = np.random.default_rng(0), either.start(seed=6)
    orders = rng.permuted(np.broadcast_to(np.arange(N), (3, J, N)), axis=-1)
    steps = [rollout._step(None, order=order[None]) for order in orders]
    np.testing.assert_array_equal([p.order[0] for p in steps], orders)
    drawn = np.stack([p.latent[0] for p in steps])
    golden = {"seed": np.array([6]), "latents": drawn, "orders": orders}
    assert compare_rollout(either.engine, golden) == ((0.0,) * 3, 3)
    golden["latents"] = drawn[:, ::-1]  # frames in another order are others
    assert min(compare_rollout(either.engine, golden)[0]) > 0.1


# -- clips


def test_clips_are_continued_by_rollouts(predictor: Predictor, clip: np.ndarray) -> None:
    """Two groups for the six latent frames after the first, or for five of them."""
    frames = torch.from_numpy(np.concatenate([clip, clip[:6][::-1]]))[None].repeat(2, 1, 1, 1, 1)
    actions = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 12, 1), np.float32))
    model, clips = load_model(predictor.bundle), Clips(frames=frames, actions=actions)
    told = latent_actions(actions, T)
    for context in (1, 2):
        out = continue_clips(
            model, predictor.sampling, clips, context=context, seed=5, canvas=True,
            predictor=predictor,
        )  # fmt: skip
        given = frames[:, : 1 + (context - 1) * T].numpy()
        rollout = predictor.start(given, seed=5)
        steps = [rollout.step(group_actions(told, context - 1 + i, J).numpy()) for i in (0, J)]
        film = np.concatenate([given, *(p.frames for p in steps)], 1)
        np.testing.assert_array_equal(out.frames, film[:, :13])
        assert out.canvas is not None
        assert out.canvas.shape == (2, T, 16, 16, 3)


def test_predict_writes_as_many_frames_as_asked_for(
    predictor: Predictor, clip: np.ndarray, tmp_path: Path
) -> None:
    """Seven pixel frames are a group of six and one of the next."""
    source, model = tmp_path / "clip.npz", predictor.bundle.path
    np.savez(source, frames=clip)
    done = run("predict", source, "-o", "out.png", "--model", model, "--frames", 7, "--context", 5,
               "--fps", 10, "--threads", 1, "--json", cwd=tmp_path)  # fmt: skip
    assert json.loads(done.stdout)["predicted_frames"] == 7
    film = [np.asarray(Image.open(p)) for p in sorted((tmp_path / "out").iterdir())]
    rollout = predictor.start(clip[:5])
    future = [frame for _ in range(2) for frame in rollout.step().frames[0]]
    np.testing.assert_array_equal(film, np.stack([*clip[:5], *future[:7]]))
    assert (tmp_path / "out_sheet.png").is_file()
    steps: list[tuple[int, int]] = []
    options = PredictOptions(frames=6)
    predict_clip(predictor, source, tmp_path / "x.mp4", options, lambda *at: steps.append(at))
    assert len(steps) == 1  # not a group more than is shown


def test_a_model_of_single_frames_is_as_it_was() -> None:
    """No axis of groups, one latent frame a step, and a prediction can be replaced."""
    predictor = canvasmar_rt.load("toytable-int8", threads=1)
    assert "frame" in components(predictor.config)
    assert "split" not in components(predictor.config)
    black = np.zeros((5, 64, 64, 3), np.uint8)
    rollout = predictor.start(black, actions=np.zeros((2, 4), np.float32))
    p = rollout.step(np.zeros(4), decode_canvas=True)
    assert {k: v.shape for k, v in arrays(p).items()} == {
        "frames": (1, 2, 64, 64, 3), "latent": (1, 64, 32), "canvas": (1, 64, 32),
        "canvas_frames": (1, 2, 64, 64, 3), "staticness": (1, 8, 8), "order": (1, 64),
    }  # fmt: skip
    assert (p.frame, rollout.frame) == (3, 4)
    rollout.observe(black[:2])
    rollout.step(), rollout.step()
    with pytest.raises(StateError, match="2 latent frames were predicted"):
        rollout.observe(black[:2])
    assert predictor.start().step().frames.shape == (1, 1, 64, 64, 3)
