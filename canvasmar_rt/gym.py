"""Gymnasium environments whose world is a rollout: one video, or a batch of them.

The model predicts frames; what they are worth, and when an episode is over, the user says. An
environment step is one latent frame. Letters as in `canvasmar_rt.config`: B videos, A numbers of an
action; t is pixel frames per latent frame, M contexts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from canvasmar_rt.config import TOYTABLE_SPEED
from canvasmar_rt.engines.program import Float32, UInt8
from canvasmar_rt.errors import ConfigError, InputError, StateError
from canvasmar_rt.rollout import Predictor, Rollout, as_array, finite_numbers

try:
    from gymnasium import Env
    from gymnasium.spaces import Box
    from gymnasium.vector import AutoresetMode, VectorEnv
    from gymnasium.vector.utils import batch_space
except ImportError as error:
    raise ImportError(
        f'canvasmar_rt.gym needs Gymnasium ({error}): pip install "canvasmar-rt[gym]"'
    ) from None

Float64 = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

TOYTABLE_ACTIONS = (-TOYTABLE_SPEED, TOYTABLE_SPEED)
"""The moves ToyTable's arm can make in a frame along x and y, in table widths."""


class _World:
    """What both environments share: contexts and spaces, checked, and how a rollout starts.

    `observations` and `actions` are the spaces of one video.
    """

    def __init__(
        self,
        predictor: Predictor,
        contexts: UInt8,
        context_actions: Float32 | None,
        action_bounds: tuple[npt.ArrayLike, npt.ArrayLike],
        max_episode_steps: int | None,
        render_mode: str | None,
    ) -> None:
        config, ae = predictor.config, predictor.config.autoencoder
        if not config.action_dim:
            raise ConfigError(
                f"gym: model {config.name} takes no actions, so there is nothing to do in its "
                "world; use a model with action_dim > 0"
            )
        # copied, as the caller's may change
        clips = as_array("contexts", contexts, "clips of one size").copy()
        if clips.ndim != 5 or not len(clips):
            raise InputError(
                f"contexts: expected uint8 (M, 1 + n*{ae.temporal_compression}, {ae.height}, "
                f"{ae.width}, 3), at least one clip; got shape {clips.shape}"
            )
        told = context_actions
        if told is not None:
            told = finite_numbers("context_actions", told)
            if told.ndim != 3 or len(told) != len(clips):
                raise InputError(
                    f"context_actions: expected float32 ({len(clips)}, n, {config.action_dim}), "
                    f"those of every clip in contexts; got shape {told.shape}"
                )
        whole = isinstance(max_episode_steps, (int, np.integer))
        if max_episode_steps is not None and not (whole and max_episode_steps >= 1):
            raise ConfigError(f"max_episode_steps: expected at least 1, got {max_episode_steps!r}")
        if render_mode not in (None, "rgb_array"):
            raise ConfigError(f"render_mode: expected 'rgb_array' or None, got {render_mode!r}")
        shape = (config.action_dim,)
        try:
            low, high = (np.broadcast_to(np.asarray(b, np.float32), shape) for b in action_bounds)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"action_bounds: expected (low, high) of {shape} ({error})") from None
        if not (low < high).all():
            raise ConfigError(f"action_bounds: low must be below high, got {low} and {high}")
        self._predictor, self._clips, self._told = predictor, clips, told
        self.actions = Box(low, high, dtype=np.float32)
        self.observations = Box(0, 255, (ae.height, ae.width, 3), np.uint8)
        self.metadata = {
            "render_modes": ["rgb_array"],
            "render_fps": config.fps / config.step_frames,
        }
        self.start(np.zeros(1, np.int64), seed=0)  # contexts of a wrong shape are refused here

    def pick(self, random: np.random.Generator, count: int) -> npt.NDArray[np.int64]:
        """Numbers of the contexts to start from, (count,)."""
        return random.integers(len(self._clips), size=count)

    def first(self, picks: npt.NDArray[np.int64]) -> UInt8:
        """Their last frames, uint8 (B, H, W, 3): the first observations."""
        frames: UInt8 = self._clips[picks, -1]
        return frames

    def start(
        self, picks: npt.NDArray[np.int64], *, seed: int, stream: int = 0, frame: int | None = None
    ) -> Rollout:
        """A rollout of these contexts, which is then at `frame`, or where it comes to be."""
        t = self._predictor.config.autoencoder.temporal_compression
        frames = 1 + (self._clips.shape[1] - 1) // t
        return self._predictor.start(
            self._clips[picks],
            actions=None if self._told is None else self._told[picks],
            seed=seed,
            stream=stream,
            clock=0 if frame is None else frame - frames,
        )

    def clip(self, action: npt.ArrayLike, rows: tuple[int, ...] = ()) -> Float32:
        """An action, or one for each of (B,) rows, within the bounds.

        Raises:
            InputError: an action of another shape, or no numbers.
        """
        values = finite_numbers("action", action)
        wanted = (*rows, *self.actions.shape)
        if values.shape != wanted:
            raise InputError(f"action: expected float32 {wanted}, got shape {values.shape}")
        clipped: Float32 = np.clip(values, self.actions.low, self.actions.high)
        return clipped


def _told(what: str, values: npt.ArrayLike, rows: tuple[int, ...], dtype: type) -> npt.NDArray[Any]:
    """What a function of the user's gave: a number, or one for each of (B,) rows.

    Raises:
        InputError: something else, which NumPy might make a number of.
    """
    wanted = f"{rows} numbers" if rows else "one number"
    array = as_array(what, values, wanted)
    if array.shape != rows or array.dtype.kind not in "fiub":
        raise InputError(f"{what}: expected {wanted}, got {array.dtype.name} {array.shape}")
    return array.astype(dtype)


def _seed(random: np.random.Generator) -> int:
    return int(random.integers(2**63))


class WorldEnv(Env[UInt8, Float32]):
    """One video as an environment.

    Observations are the newest pixel frame, uint8 RGB (H, W, 3); actions float32 (A,), clipped to
    their bounds. An episode starts from one of the contexts, picked, as the noise is, by the seeded
    `np_random`.
    """

    def __init__(
        self,
        predictor: Predictor,
        contexts: UInt8,
        reward: Callable[[UInt8, Float32], float],
        *,
        terminated: Callable[[UInt8, Float32], bool] | None = None,
        max_episode_steps: int | None = None,
        context_actions: Float32 | None = None,
        action_bounds: tuple[npt.ArrayLike, npt.ArrayLike] = TOYTABLE_ACTIONS,
        render_mode: str | None = None,
    ) -> None:
        """
        Args:
            contexts: uint8 RGB (M, 1 + n*t, H, W, 3), clips to start from.
            reward: what a step is worth, from its frames uint8 (t, H, W, 3) and action (A,).
            terminated: of the same, whether the task is over; never if None.
            max_episode_steps: truncates the episode; pictures drift on long ones.
            context_actions: float32 (M, n, A), the actions within the contexts.
            action_bounds: low and high, numbers or (A,).
            render_mode: `rgb_array`, the newest frame; or None.

        Raises:
            ConfigError: a model without actions, or an option out of range.
            InputError: contexts or their actions of a wrong shape or dtype, or not finite.
        """
        self._world = _World(
            predictor, contexts, context_actions, action_bounds, max_episode_steps, render_mode
        )
        self.observation_space, self.action_space = self._world.observations, self._world.actions
        self.metadata, self.render_mode = self._world.metadata, render_mode
        self._reward, self._terminated, self._limit = reward, terminated, max_episode_steps
        self._rollout: Rollout | None = None
        self._steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[UInt8, dict[str, Any]]:
        """Start an episode; there are no options."""
        super().reset(seed=seed)
        picks = self._world.pick(self.np_random, 1)
        self._rollout = self._world.start(picks, seed=_seed(self.np_random))
        self._steps = 0
        self._newest = self._world.first(picks)[0]
        return self._newest.copy(), {}

    def step(self, action: Float32) -> tuple[UInt8, float, bool, bool, dict[str, Any]]:
        """Observation, reward, terminated, truncated, and an empty info.

        Raises:
            StateError: before the first reset.
            InputError: an action of another shape, or an action, reward or termination that is no
                number.
        """
        if self._rollout is None:
            raise StateError("step: there is no episode; call reset() first")
        told = self._world.clip(action)
        frames = self._rollout.step(told).frames[0]
        self._steps += 1
        self._newest = frames[-1].copy()  # `reward` and `terminated` may alter theirs
        value = float(_told("reward", self._reward(frames, told), (), np.float64))
        over = False
        if self._terminated is not None:
            over = bool(_told("terminated", self._terminated(frames, told), (), np.bool_))
        cut = self._limit is not None and self._steps >= self._limit
        return self._newest.copy(), value, over, cut, {}

    def render(self) -> UInt8 | None:
        """The newest frame, uint8 (H, W, 3), in mode `rgb_array`."""
        return self._newest.copy() if self.render_mode and self._rollout else None

    def close(self) -> None:
        """Free the rollout."""
        self._rollout = None


class WorldVectorEnv(VectorEnv[UInt8, Float32, npt.NDArray[Any]]):
    """A batch of videos as a vector environment, one model run a step.

    An episode that ends is followed by the next one in the same step (`AutoresetMode.SAME_STEP`):
    its last observation is in `info["final_obs"]`. The new video takes the row's seat in the batch
    (`Rollout.seat`); nothing is recomputed for the others.
    """

    def __init__(
        self,
        predictor: Predictor,
        contexts: UInt8,
        reward: Callable[[UInt8, Float32], npt.ArrayLike],
        *,
        num_envs: int,
        terminated: Callable[[UInt8, Float32], npt.ArrayLike] | None = None,
        max_episode_steps: int | None = None,
        context_actions: Float32 | None = None,
        action_bounds: tuple[npt.ArrayLike, npt.ArrayLike] = TOYTABLE_ACTIONS,
        render_mode: str | None = None,
    ) -> None:
        """
        Args:
            reward, terminated: as of `WorldEnv` for all rows at once: from frames uint8
                (B, t, H, W, 3) and actions (B, A), both (B,).
            num_envs: B.

        Raises:
            ConfigError, InputError: as `WorldEnv`, or more videos than the bundle takes.
        """
        predictor.bundle.manifest.batch.require(num_envs)
        self._world = _World(
            predictor, contexts, context_actions, action_bounds, max_episode_steps, render_mode
        )
        self.num_envs, self.render_mode = num_envs, render_mode
        self.single_observation_space = self._world.observations
        self.single_action_space = self._world.actions
        self.observation_space = batch_space(self._world.observations, num_envs)
        self.action_space = batch_space(self._world.actions, num_envs)
        self.metadata = {**self._world.metadata, "autoreset_mode": AutoresetMode.SAME_STEP}
        self._reward, self._terminated, self._limit = reward, terminated, max_episode_steps
        self._rollout: Rollout | None = None
        self._steps = np.zeros(num_envs, np.int64)
        self._episodes = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[UInt8, dict[str, Any]]:
        """Start an episode in every row; there are no options."""
        super().reset(seed=seed)
        picks = self._world.pick(self.np_random, self.num_envs)
        self._rollout = self._world.start(picks, seed=_seed(self.np_random))
        self._episodes = self.num_envs
        self._steps[:] = 0
        self._newest = self._world.first(picks)
        return self._newest.copy(), {}

    def step(self, actions: Float32) -> tuple[UInt8, Float64, Bools, Bools, dict[str, Any]]:
        """Observations, rewards, terminations, truncations (B, ...), and info.

        Raises:
            StateError: before the first reset.
            InputError: actions, rewards or terminations of another shape, or no numbers.
        """
        if self._rollout is None:
            raise StateError("step: there is no episode; call reset() first")
        told = self._world.clip(actions, (self.num_envs,))
        frames = self._rollout.step(told).frames
        self._steps += 1
        self._newest = frames[:, -1].copy()
        rows = (self.num_envs,)
        rewards = _told("reward", self._reward(frames, told), rows, np.float64)
        over = np.zeros(rows, np.bool_)
        if self._terminated is not None:
            over = _told("terminated", self._terminated(frames, told), rows, np.bool_)
        cut = np.zeros(self.num_envs, np.bool_)
        if self._limit is not None:
            cut = self._steps >= self._limit
        info: dict[str, Any] = {}
        for row in np.flatnonzero(over | cut).tolist():
            last = {"final_obs": self._newest[row].copy(), "final_info": {}}
            info = self._add_info(info, last, row)
            self._restart(self._rollout, row)
        return self._newest.copy(), rewards, over, cut, info

    def _restart(self, rollout: Rollout, row: int) -> None:
        """Begin another episode in a row, on a noise stream of its own."""
        picks = self._world.pick(self.np_random, 1)
        video = self._world.start(
            picks, seed=rollout.seed, stream=self._episodes, frame=rollout.frame
        )
        rollout.seat(row, video.state())
        self._episodes += 1
        self._steps[row] = 0
        self._newest[row] = self._world.first(picks)[0]

    def render(self) -> tuple[UInt8, ...] | None:
        """The newest frame of each row, uint8 (H, W, 3), in mode `rgb_array`."""
        return tuple(self._newest.copy()) if self.render_mode and self._rollout else None

    def close_extras(self, **kwargs: Any) -> None:
        """Free the rollout."""
        self._rollout = None
