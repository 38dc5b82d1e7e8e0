"""A 10 Hz control loop with a budget: predict what an action will do, do it, see what it did.

    python -m examples.robot_loop --seconds 10

Each tick predicts one latent frame (two camera frames) within its budget, acts, and observes what
the camera saw in place of the prediction. `surprise` is the mean difference of the two in grey
levels: a jump means that the world does not do what it should. From a checkout with the training
extra the robot is ToyTable's simulator; without, the packaged clip, played with its own actions.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Protocol

import numpy as np
import numpy.typing as npt

import canvasmar_rt
from canvasmar_rt.bundle import DEMO_CLIP
from canvasmar_rt.errors import CanvasMarError

Frames = npt.NDArray[np.uint8]
Action = npt.NDArray[np.float32]

CONTEXT = 5  # camera frames


class Robot(Protocol):
    """`context` is what the camera saw so far, uint8 (CONTEXT, H, W, 3)."""

    context: Frames

    def choose(self) -> Action:
        """The next action (4,): dx, dy of two camera frames. A controller would be here."""

    def act(self, action: Action) -> Frames:
        """Do it, and return what the camera saw: uint8 (2, H, W, 3)."""


class Recording:
    """The packaged clip over and over; it does what it did, whatever the action."""

    def __init__(self) -> None:
        with np.load(DEMO_CLIP) as clip:
            frames, actions = clip["frames"], clip["actions"]
        self.context = frames[:CONTEXT]
        self._frames = frames[CONTEXT:].reshape(-1, 2, *frames.shape[1:])
        self._actions = actions[CONTEXT - 1 :].reshape(-1, 4)
        self._time = 0

    def choose(self) -> Action:
        action: Action = self._actions[self._time % len(self._actions)]
        return action

    def act(self, action: Action) -> Frames:
        frames: Frames = self._frames[self._time % len(self._frames)]
        self._time += 1
        return frames


class Simulator:
    """ToyTable's arm, driven in a circle."""

    def __init__(self) -> None:
        import torch  # noqa: TID251 - the simulator is written in it

        from training import toytable

        torch.set_num_threads(1)  # so small a world gains nothing from more
        self._world, self._config = toytable, toytable.ToyTableConfig()
        self._state = toytable.reset(self._config, batch=1, seed=4)
        still = np.zeros(4, np.float32)
        seen = [toytable.render(self._config, self._state).numpy()]
        seen += [self.act(still) for _ in range(CONTEXT // 2)]
        self.context = np.concatenate(seen)
        self._time = 0

    def choose(self) -> Action:
        self._time += 1
        angle = 0.2 * self._time
        return np.tile(0.03 * np.array([np.cos(angle), np.sin(angle)], np.float32), 2)

    def act(self, action: Action) -> Frames:
        seen = []
        for move in action.reshape(2, 2):
            told = self._state.gripper.new_tensor(move)[None]
            self._state = self._world.step(self._config, self._state, told)
            seen.append(self._world.render(self._config, self._state)[0].numpy())
        return np.stack(seen)


def robot() -> Robot:
    try:
        return Simulator()
    except ImportError:
        return Recording()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="toytable-int8", help="bundle with actions of 4 numbers")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rate", type=float, default=10, help="ticks a second")
    parser.add_argument("--budget", type=float, default=50, help="ms of a tick for the prediction")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if not (options.rate > 0 and options.budget > 0):
        parser.error("--rate and --budget must be above 0")
    if not 0 <= options.seconds * options.rate < 1e9:
        parser.error("--seconds and --rate give no number of ticks")
    try:
        predictor = canvasmar_rt.load(options.model, threads=options.threads)
    except CanvasMarError as error:
        parser.error(str(error))
    if predictor.config.action_dim != 4:
        parser.error(f"--model: takes {predictor.config.action_dim} numbers of action, not 4")

    real = robot()
    print(f"robot: {type(real).__name__.lower()}")
    rollout = predictor.start(real.context)
    rollout.warmup(deadlines=True)
    for rung in rollout.latency:
        print(f"{rung.ar_steps} AR, {rung.flow_steps} flow steps: p99 {rung.p99_ms:.1f} ms")

    period = 1 / options.rate
    ticks = max(1, round(options.seconds * options.rate))
    latencies, missed = [], 0
    due = time.perf_counter()
    for tick in range(ticks):
        time.sleep(max(0.0, due - time.perf_counter()))
        action = real.choose()
        start = time.perf_counter()
        prediction = rollout.step(action, budget_ms=options.budget)
        latencies.append(1e3 * (time.perf_counter() - start))
        # A controller would look at prediction.frames here, and perhaps act otherwise.
        frames = real.act(action)
        rollout.observe(frames)
        done = time.perf_counter()
        late = done - due > period
        # time lost is not caught up with: a robot must not act in a burst
        due = max(due + period, done)
        missed += late or not prediction.deadline_met
        surprise = np.abs(prediction.frames[0].astype(int) - frames).mean()
        print(
            f"tick {tick:4d}  {latencies[-1]:6.1f} ms  ar_steps {prediction.ar_steps}  "
            f"surprise {surprise:4.1f}{'' if prediction.deadline_met else '  over budget'}"
            f"{'  late' if late else ''}"
        )
    worst = max(latencies)
    print(
        f"{ticks} ticks, missed {missed}; prediction p50 {statistics.median(latencies):.1f} ms, "
        f"worst {worst:.1f} ms"
    )


if __name__ == "__main__":
    main()
