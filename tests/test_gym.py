"""Environments over rollouts: Gymnasium's own checks, seeds, autoreset, and what is refused."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import RecordEpisodeStatistics

import canvasmar_rt
from canvasmar_rt.errors import ConfigError, InputError, StateError
from canvasmar_rt.gym import TOYTABLE_ACTIONS, WorldEnv, WorldVectorEnv
from training.toytable import ToyTableConfig, generate


@pytest.fixture(scope="session")
def predictor() -> canvasmar_rt.Predictor:
    return canvasmar_rt.load("toytable-int8", threads=1)


@pytest.fixture(scope="session")
def clips() -> tuple[np.ndarray, np.ndarray]:
    """Three tables, uint8 (3, 5, 64, 64, 3), and the actions in them, float32 (3, 2, 4)."""
    made = generate(ToyTableConfig(), batch=3, frames=5, seed=600)
    return made.frames.numpy(), made.actions.reshape(3, 2, 4).numpy()


def darkness(frames: np.ndarray, action: np.ndarray) -> Any:
    """A reward for one (t, H, W, 3) or a batch of them."""
    return 1 - frames.mean((-1, -2, -3, -4)) / 255


@pytest.fixture
def make(
    predictor: canvasmar_rt.Predictor, clips: tuple[np.ndarray, np.ndarray]
) -> Callable[..., WorldEnv]:
    return lambda **options: WorldEnv(
        predictor, clips[0], darkness, context_actions=clips[1], **options
    )


@pytest.fixture
def make_vector(
    predictor: canvasmar_rt.Predictor, clips: tuple[np.ndarray, np.ndarray]
) -> Callable[..., WorldVectorEnv]:
    return lambda **options: WorldVectorEnv(
        predictor, clips[0], darkness, context_actions=clips[1], **options
    )


def play(env: WorldEnv | WorldVectorEnv, seed: int, steps: int) -> list[Any]:
    env.action_space.seed(seed)
    seen = [env.reset(seed=seed)]
    return [*seen, *(env.step(env.action_space.sample()) for _ in range(steps))]


def test_gymnasiums_checker_passes(make: Callable[..., WorldEnv]) -> None:
    """With a spec, so that the checker also compares what seeds give and tries every mode."""
    gymnasium.register("canvasmar-rt-test/World-v0", entry_point=make, max_episode_steps=None)
    try:
        env = gymnasium.make("canvasmar-rt-test/World-v0", render_mode="rgb_array")
        check_env(env.unwrapped)
        env.close()
    finally:
        del gymnasium.registry["canvasmar-rt-test/World-v0"]


def test_a_seed_decides_everything(make: Callable[..., WorldEnv]) -> None:
    env = make()
    first, again, other = play(env, 3, 2), play(env, 3, 2), play(env, 4, 2)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a[0], b[0])
        assert a[1:] == b[1:]
    assert not np.array_equal(first[-1][0], other[-1][0])
    unseeded = [env.reset()[0] for _ in range(12)]
    assert len({frame.tobytes() for frame in unseeded}) == 3  # every context has its turn


def test_an_episode(
    predictor: canvasmar_rt.Predictor, clips: tuple[np.ndarray, np.ndarray]
) -> None:
    """Shapes, the user's reward and end, clipping, truncation and rendering."""
    told = []

    def reward(frames: np.ndarray, action: np.ndarray) -> float:
        told.append((frames.shape, action.copy()))
        return 0.5

    env = WorldEnv(
        predictor, clips[0][:1], reward, max_episode_steps=3, render_mode="rgb_array",
        terminated=lambda frames, action: bool(action[0] > 0.05),
    )  # fmt: skip
    frame, info = env.reset(seed=0)
    np.testing.assert_array_equal(frame, clips[0][0, -1])
    assert info == {}
    assert env.metadata["render_fps"] == 5
    for n in range(1, 4):
        seen, value, over, cut, info = env.step(np.array([-1, 0, 0.02, 0], np.float32))
        assert (value, over, cut, info) == (0.5, False, n == 3, {})
        assert seen in env.observation_space
        np.testing.assert_array_equal(env.render(), seen)
    assert told[0][0] == (2, 64, 64, 3)
    np.testing.assert_array_equal(told[0][1], np.float32([TOYTABLE_ACTIONS[0], 0, 0.02, 0]))
    env.reset()
    assert env.step(np.full(4, 0.06, np.float32))[2:4] == (True, False)
    env.close()
    env.close()
    with pytest.raises(StateError, match="reset"):
        env.step(np.zeros(4, np.float32))


def test_a_vector_of_one_is_the_environment(
    make: Callable[..., WorldEnv], make_vector: Callable[..., WorldVectorEnv]
) -> None:
    """The same seed gives the same context, frames and rewards."""
    one, many = make(), make_vector(num_envs=1)
    one.reset(seed=8)
    many.reset(seed=8)
    for action in np.linspace(-0.05, 0.05, 8, dtype=np.float32).reshape(2, 4):
        a, b = one.step(action), many.step(action[None])
        np.testing.assert_array_equal(a[0], b[0][0])
        assert a[1] == b[1][0]


@pytest.mark.parametrize("vector", [False, True])
def test_what_a_reward_does_to_its_frames_is_not_seen(
    predictor: canvasmar_rt.Predictor, clips: tuple[np.ndarray, np.ndarray], vector: bool
) -> None:
    def spoil(frames: np.ndarray, action: np.ndarray) -> Any:
        value = darkness(frames, action)
        frames[:] = 0
        return value

    def make(reward: Callable[..., Any], **options: Any) -> WorldEnv | WorldVectorEnv:
        options |= {"render_mode": "rgb_array"}
        if vector:
            return WorldVectorEnv(predictor, clips[0], reward, num_envs=1, **options)
        return WorldEnv(predictor, clips[0], reward, **options)

    plain = make(darkness)
    spoilt = make(spoil, terminated=lambda frames, action: spoil(frames, action) < 0)
    for (want, value, *_), (seen, got, *_) in zip(
        play(plain, 3, 2)[1:], play(spoilt, 3, 2)[1:], strict=True
    ):
        np.testing.assert_array_equal(seen, want)
        assert got == value
    np.testing.assert_array_equal(spoilt.render(), plain.render())


def test_a_row_that_ends_begins_anew_and_leaves_the_others_alone(
    clips: tuple[np.ndarray, np.ndarray],
) -> None:
    """Bit for bit in a float bundle; the rows of an int8 one share quantisation scales."""
    predictor = canvasmar_rt.load("toytable", threads=1, profile="fast")
    ends = np.zeros((3, 3), bool)
    ends[1, 1] = True  # at the second step, in the second row

    def run(ends: np.ndarray) -> list[Any]:
        turns = iter(ends)
        env = WorldVectorEnv(
            predictor, clips[0], darkness, num_envs=3,
            context_actions=clips[1], terminated=lambda frames, actions: next(turns),
        )  # fmt: skip
        assert env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
        return play(env, 1, 3)

    plain, reset = run(np.zeros_like(ends)), run(ends)
    last = reset[2]
    assert last[2].tolist() == [False, True, False]
    assert plain[2][4] == {}
    assert last[4]["_final_obs"].tolist() == [False, True, False]
    np.testing.assert_array_equal(last[4]["final_obs"][1], plain[2][0][1])
    assert last[1][1] == plain[2][1][1]  # the reward is of the step that ended
    starts = clips[0][:, -1].astype(int)
    assert any(np.array_equal(last[0][1], start) for start in starts)
    for row in (0, 2):
        np.testing.assert_array_equal(last[0][row], plain[2][0][row])
        np.testing.assert_array_equal(reset[3][0][row], plain[3][0][row])
    # the next frame goes on from the new context
    begun = last[0][1].astype(int)
    away = np.abs(reset[3][0][1] - starts).mean((1, 2, 3))
    assert away.argmin() == np.abs(begun - starts).mean((1, 2, 3)).argmin()
    assert away.min() < 10


def test_vectors_are_seeded_and_truncated(make_vector: Callable[..., WorldVectorEnv]) -> None:
    """Autoreset included: what follows an ended episode is the same again."""
    env = make_vector(num_envs=2, max_episode_steps=2, render_mode="rgb_array")
    first, again = play(env, 5, 4), play(env, 5, 4)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a[0], b[0])
    assert [turn[3].tolist() for turn in first[1:]] == [[False] * 2, [True] * 2] * 2
    assert not np.array_equal(first[1][0], first[3][0])
    shown = env.render()
    assert shown is not None
    np.testing.assert_array_equal(np.stack(shown), again[-1][0])
    env.close()
    with pytest.raises(StateError, match="reset"):
        env.step(env.action_space.sample())


def test_a_wrapper_counts_episodes(make_vector: Callable[..., WorldVectorEnv]) -> None:
    env = RecordEpisodeStatistics(make_vector(num_envs=2, max_episode_steps=2))
    env.reset(seed=0)
    total = np.zeros(2)
    for _ in range(2):
        *_, info = (turn := env.step(env.action_space.sample()))
        total += turn[1]
    assert info["episode"]["l"].tolist() == [2, 2]
    np.testing.assert_allclose(info["episode"]["r"], total)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"max_episode_steps": 0}, ConfigError, "max_episode_steps"),
        ({"max_episode_steps": "5"}, ConfigError, "max_episode_steps"),
        ({"action_bounds": 1}, ConfigError, "action_bounds"),
        (
            {"contexts": [np.zeros((n, 64, 64, 3), np.uint8) for n in (3, 5)]},
            InputError,
            "one size",
        ),
        ({"render_mode": "human"}, ConfigError, "rgb_array"),
        ({"action_bounds": (0.1, -0.1)}, ConfigError, "below"),
        ({"action_bounds": (np.zeros(3), np.ones(3))}, ConfigError, "action_bounds"),
        ({"contexts": np.zeros((5, 64, 64, 3), np.uint8)}, InputError, "clip"),
        ({"contexts": np.zeros((1, 4, 64, 64, 3), np.uint8)}, InputError, "1 \\+ n"),
        ({"context_actions": np.zeros((3, 1, 4), np.float32)}, InputError, "actions"),
        ({"context_actions": np.zeros((1, 2, 4), np.float32)}, InputError, "every clip"),
        ({"context_actions": np.zeros((4, 2, 4), np.float32)}, InputError, "every clip"),
        ({"context_actions": [[[0] * 4] * 2, [[0] * 4], []]}, InputError, "expected numbers"),
        (
            {"context_actions": np.float32([0, 0, np.nan]).repeat(8).reshape(3, 2, 4)},
            InputError,
            "finite",
        ),
        ({"num_envs": 10_000}, InputError, "batch"),
    ],
)
def test_refusals(
    predictor: canvasmar_rt.Predictor,
    clips: tuple[np.ndarray, np.ndarray],
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    options = {"contexts": clips[0], "reward": darkness, "num_envs": 2, **changes}
    with pytest.raises(error, match=message):
        WorldVectorEnv(predictor, **options)


@pytest.mark.parametrize("action", [0.0, [0.0], np.zeros((1, 4)), [0.0] * 2, np.zeros((4, 1))])
def test_actions_of_another_shape(make: Callable[..., WorldEnv], action: Any) -> None:
    env = make()
    env.reset(seed=0)
    with pytest.raises(InputError, match=r"action: expected float32 \(4,\), got shape"):
        env.step(action)


@pytest.mark.parametrize("actions", [0.0, np.zeros(4), np.zeros((4, 1)), np.zeros((1, 4)), [[]]])
def test_vector_actions_of_another_shape(
    make_vector: Callable[..., WorldVectorEnv], actions: Any
) -> None:
    env = make_vector(num_envs=4)
    env.reset(seed=0)
    with pytest.raises(InputError, match=r"action: expected float32 \(4, 4\), got shape"):
        env.step(actions)


def test_an_action_that_is_no_number(make: Callable[..., WorldEnv]) -> None:
    env = make()
    env.reset(seed=0)
    with pytest.raises(InputError, match="expected numbers"):
        env.step(["left", "up", "up", "up"])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="finite"):
        env.step(np.full(4, np.nan, np.float32))


@pytest.mark.parametrize("given", [0.0, None, [None, 1], ["1", "2"], [1j, 2], [[1], [2, 3]], [{}]])
@pytest.mark.parametrize("what", ["reward", "terminated"])
def test_rewards_and_ends_are_a_number_a_row(
    predictor: canvasmar_rt.Predictor, clips: tuple[np.ndarray, np.ndarray], what: str, given: Any
) -> None:
    functions: dict[str, Any] = {"reward": lambda frames, actions: np.zeros(len(actions))}
    functions[what] = lambda frames, actions: given
    env = WorldVectorEnv(predictor, clips[0], num_envs=2, **functions)
    env.reset(seed=0)
    with pytest.raises(InputError, match=rf"{what}: expected \(2,\) numbers"):
        env.step(env.action_space.sample())


@pytest.mark.parametrize("given", [None, "1", 1j, np.ones(1), [1, [2]]])
@pytest.mark.parametrize("what", ["reward", "terminated"])
def test_a_reward_and_an_end_are_a_number(
    predictor: canvasmar_rt.Predictor, clips: tuple[np.ndarray, np.ndarray], what: str, given: Any
) -> None:
    functions: dict[str, Any] = {"reward": lambda frames, action: 0}
    functions[what] = lambda frames, action: given
    env = WorldEnv(predictor, clips[0], **functions)
    env.reset(seed=0)
    with pytest.raises(InputError, match=f"{what}: expected one number"):
        env.step(env.action_space.sample())


def test_a_model_without_actions_has_no_environment(
    predictor: canvasmar_rt.Predictor, clips: tuple[np.ndarray, np.ndarray]
) -> None:
    still = canvasmar_rt.Predictor(predictor.engine)
    still.config = dataclasses.replace(predictor.config, action_dim=0)
    with pytest.raises(ConfigError, match="takes no actions"):
        WorldEnv(still, clips[0], darkness)


def test_the_documentation_runs() -> None:
    page = Path(__file__).resolve().parents[1] / "docs" / "gym.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    seen: dict[str, Any] = {}
    exec(code, seen)
    assert seen["frames"].shape == (4, 64, 64, 3)
    assert seen["values"].shape == (4,)
