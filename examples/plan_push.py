"""Push a toy to a goal by planning in imagination, and act it out in the real simulator.

    pip install -e ".[train]"
    python -m examples.plan_push --tasks 24 --out runs/push

Every tick the rollout is forked, candidate actions are tried on the fork as one batch, gripper and
toy are read from the imagined pixels, and the best action is executed; `observe` then tells the
rollout what really happened. Others show what that is worth: random actions, a rule of contact
with and without the model, and an oracle that plans in the simulator. See docs/planning.md.

Notation: n candidates, H latent steps of two pixel frames, B pictures; positions (x, y) in table
widths, moves (dx, dy) in table widths a pixel frame.
"""

from __future__ import annotations

import argparse
import colorsys
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch  # noqa: TID251 - the simulator is written in it

import canvasmar_rt
from canvasmar_rt.contact_sheet import contact_sheet
from canvasmar_rt.errors import CanvasMarError
from canvasmar_rt.files import check_writable
from canvasmar_rt.video import write_clip, write_png
from training import toytable
from training.toytable import ToyTableConfig, WorldState

Floats = npt.NDArray[np.float64]
Frames = npt.NDArray[np.uint8]

WORLD = ToyTableConfig()
CONTEXT = 5  # pixel frames seen before the first action
HORIZON = 2  # latent steps looked ahead
CANDIDATES, ROUNDS, ELITES = 16, 2, 4  # of the cross-entropy method
GOAL_AWAY, REACHED = 0.22, 0.07  # table widths: how far the goal is, and how near counts
CONTACT = 0.13  # table widths between the centres of gripper and toy when they touch
BEHIND_WEIGHT = 0.6
GRIPPER_HUE = 0.87
LEAST_AREA = 8  # pixels of a hue that are enough to tell where it is


# ---------------------------------------------------------------------------------------------
# The task, in the real world


@dataclasses.dataclass(frozen=True)
class Task:
    """Push the toy of hue `hue` (turns), which is in slot `toy`, to `goal`. `context` uint8
    (CONTEXT, H, W, 3) was seen, and `state` is the world behind its last frame."""

    state: WorldState
    context: Frames
    toy: int
    hue: float
    goal: Floats


def make_task(number: int) -> Task:
    """The toy nearest to the gripper is to go on past it, within 40 degrees of straight on."""
    rng = np.random.default_rng(number)
    clip = 0
    while True:
        state = toytable.reset(WORLD, batch=1, seed=60_000 + number, first_clip=clip)
        gripper, toys = state.gripper[0].numpy(), state.toys[0].numpy()
        toy = int(np.linalg.norm(toys - gripper, axis=-1).argmin())
        away = np.arctan2(*(toys[toy] - gripper)[::-1]) + rng.uniform(-0.7, 0.7)
        goal = toys[toy] + GOAL_AWAY * np.array([np.cos(away), np.sin(away)])
        free = np.linalg.norm(np.delete(toys, toy, 0) - goal, axis=-1).min() > 0.2
        if free and (np.abs(goal - 0.5) < 0.3).all():
            break
        clip += 1
    frames = [toytable.render(WORLD, state).numpy()]
    for _ in range(CONTEXT // 2):
        state, seen = act(state, np.zeros(2))
        frames.append(seen)
    hue = colorsys.rgb_to_hsv(*state.toy_colour[0, toy].tolist())[0]
    return Task(state, np.concatenate(frames), toy, hue, goal)


def act(state: WorldState, move: Floats) -> tuple[WorldState, Frames]:
    """The real world: two pixel frames of one move. The new state, and uint8 (2, H, W, 3)."""
    seen = []
    for _ in range(2):
        state = toytable.step(WORLD, state, state.gripper.new_tensor(move)[None])
        seen.append(toytable.render(WORLD, state)[0].numpy())
    return state, np.stack(seen)


# ---------------------------------------------------------------------------------------------
# Two worlds to plan in


@dataclasses.dataclass(frozen=True)
class Future:
    """Where gripper and toy come to be after each latent step, both (n, H, 2)."""

    gripper: Floats
    toy: Floats


class World(Protocol):
    def imagine(self, moves: Floats) -> Future:
        """What comes of each of n moves (n, 2) if it is kept up for H latent steps."""

    def observe(self, move: Floats, frames: Frames, state: WorldState) -> None:
        """What a move really led to."""


class Learned:
    """The model: it knows the real world by its frames alone. With `contact` above 0 the planner is
    told as well that toys stay so far from the gripper."""

    def __init__(self, predictor: canvasmar_rt.Predictor, task: Task, contact: float) -> None:
        still = np.zeros((CONTEXT // 2, 4), np.float32)
        self._rollout = predictor.start(task.context, actions=still)
        self._futures: canvasmar_rt.Rollout | None = None
        self._hue, self._contact = task.hue, contact
        self._gripper, _ = centre(task.context[-1:], GRIPPER_HUE)
        self._toy, self._area = centre(task.context[-1:], task.hue)

    def imagine(self, moves: Floats) -> Future:
        n = len(moves)
        self._futures = self._rollout.fork(n, into=self._futures)
        gripper, toy = np.repeat(self._gripper, n, axis=0), np.repeat(self._toy, n, axis=0)
        path = []
        for _ in range(HORIZON):
            frames = self._step(self._futures, moves)
            for k in range(frames.shape[1]):
                gripper, toy = self._read(frames[:, k], gripper + moves, toy)
            path.append((gripper, toy))
        grippers, toys = zip(*path, strict=True)
        return Future(np.stack(grippers, axis=1), np.stack(toys, axis=1))

    def _step(self, futures: canvasmar_rt.Rollout, moves: Floats) -> Frames:
        """Imagine a latent step, uint8 (n, 2, H, W, 3)."""
        return futures.step(np.tile(moves, 2).astype(np.float32)).frames

    def _read(self, frames: Frames, gripper: Floats, toy: Floats) -> tuple[Floats, Floats]:
        """Gripper and toy (B, 2) in uint8 (B, H, W, 3), given where they are if they are not seen.

        The gripper fades at times, and toys that it touches often melt: of one of which less than
        half is left the place is not read.
        """
        seen, area = centre(frames, GRIPPER_HUE)
        gripper = np.where(area[:, None] >= LEAST_AREA / 2, seen, gripper)
        seen, area = centre(frames, self._hue)
        toy = np.where(area[:, None] >= max(LEAST_AREA, self._area[0] / 2), seen, toy)
        away = toy - gripper
        gap = np.maximum(np.linalg.norm(away, axis=-1, keepdims=True), 1e-6)
        return gripper, np.where(gap < self._contact, gripper + away * self._contact / gap, toy)

    def observe(self, move: Floats, frames: Frames, state: WorldState) -> None:
        self._rollout.observe(frames, np.tile(move, 2).astype(np.float32))
        self._gripper, _ = centre(frames[-1:], GRIPPER_HUE)
        toy, area = centre(frames[-1:], self._hue)
        if area[0] >= LEAST_AREA:  # or it is under the arm
            self._toy, self._area = toy, area


class Rule(Learned):
    """What the planner is told, without imagining: the gripper goes where it is sent, and the toy
    out of its way. The pictures of the future are blank, so nothing is read from them."""

    def _step(self, futures: canvasmar_rt.Rollout, moves: Floats) -> Frames:
        return np.zeros((len(moves), 2, WORLD.size, WORLD.size, 3), np.uint8)


class Oracle:
    """The simulator itself: state and dynamics."""

    def __init__(self, task: Task) -> None:
        self._state, self._toy = task.state, task.toy

    def imagine(self, moves: Floats) -> Future:
        fields = (f.name for f in dataclasses.fields(WorldState))
        one = {name: getattr(self._state, name) for name in fields}
        state = WorldState(**{k: v.repeat_interleave(len(moves), 0) for k, v in one.items()})
        grippers, toys = [], []
        for _ in range(HORIZON):
            for _ in range(2):
                state = toytable.step(WORLD, state, state.gripper.new_tensor(moves))
            grippers.append(state.gripper.numpy().astype(np.float64))
            toys.append(state.toys[:, self._toy].numpy().astype(np.float64))
        return Future(np.stack(grippers, axis=1), np.stack(toys, axis=1))

    def observe(self, move: Floats, frames: Frames, state: WorldState) -> None:
        self._state = state


def centre(frames: Frames, hue: float) -> tuple[Floats, Floats]:
    """Where a hue is in uint8 (B, H, W, 3): centroid (B, 2) of its vivid pixels, and how many."""
    red, green, blue = np.moveaxis(frames.astype(np.float32) / 255, -1, 0)
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    safe = np.maximum(chroma, 1e-6)
    seen = np.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4)
    seen = np.where(value == red, (green - blue) / safe % 6, seen) / 6
    near = np.abs((seen - hue + 0.5) % 1 - 0.5) < 0.045
    mask = near & (chroma > 0.55 * value) & (value > 0.2)
    area = mask.sum((1, 2)).astype(np.float64)
    line = (np.arange(frames.shape[2]) + 0.5) / frames.shape[2]
    sums = np.stack((mask.sum(1) @ line, mask.sum(2) @ line), axis=-1)
    return sums / np.maximum(area, 1)[:, None], area


# ---------------------------------------------------------------------------------------------
# Planning


def cost(future: Future, goal: Floats) -> Floats:
    """(n,): how far the toy is from the goal, and the gripper from where it can push it there."""
    way = goal - future.toy
    left = np.linalg.norm(way, axis=-1)
    behind = future.toy - way / np.maximum(left, 1e-6)[..., None] * CONTACT
    aside = np.linalg.norm(future.gripper - behind, axis=-1)
    costs: Floats = (left + BEHIND_WEIGHT * aside).mean(axis=1)
    return costs


def plan(world: World, goal: Floats, rng: np.random.Generator) -> Floats:
    """The best move (2,) by the cross-entropy method, of those kept up for the whole horizon."""
    number = np.arange(CANDIDATES)
    angle = 2 * np.pi * (number + rng.random()) / CANDIDATES
    speed = WORLD.max_speed * np.where(number % 2, 0.5, 1.0)
    moves = speed[:, None] * np.stack((np.cos(angle), np.sin(angle)), axis=-1)
    best: Floats = moves[0]
    least = np.inf
    for _ in range(ROUNDS):
        costs = cost(world.imagine(moves), goal)
        if costs.min() < least:
            best, least = moves[costs.argmin()], costs.min()
        elite = moves[costs.argsort()[:ELITES]]
        spread = elite.std(axis=0) + 0.1 * WORLD.max_speed
        moves = elite.mean(axis=0) + spread * rng.normal(size=moves.shape)
        length = np.linalg.norm(moves, axis=-1, keepdims=True)
        moves *= np.minimum(1, WORLD.max_speed / np.maximum(length, 1e-6))
    return best


def random_move(rng: np.random.Generator) -> Floats:
    angle, speed = rng.uniform(0, 2 * np.pi), rng.uniform(0, WORLD.max_speed)
    return np.array([speed * np.cos(angle), speed * np.sin(angle)])


# ---------------------------------------------------------------------------------------------
# Episodes


@dataclasses.dataclass(frozen=True)
class Episode:
    """How far the toy was from the goal, tick by tick, in truth; and the film of it."""

    distances: list[float]
    film: Frames

    @property
    def reached(self) -> bool:
        return self.distances[-1] < REACHED


def play(task: Task, world: World | None, ticks: int, rng: np.random.Generator) -> Episode:
    """One attempt, which ends when the toy is there; with random moves if there is no world."""

    def distance(state: WorldState) -> float:
        return float(np.linalg.norm(state.toys[0, task.toy].numpy() - task.goal))

    state, film, distances = task.state, [task.context[-1:]], [distance(task.state)]
    while len(distances) <= ticks and distances[-1] >= REACHED:
        move = plan(world, task.goal, rng) if world else random_move(rng)
        state, seen = act(state, move)
        if world:
            world.observe(move, seen, state)
        film.append(seen)
        distances.append(distance(state))
    return Episode(distances, np.concatenate(film))


def report(episodes: list[Episode], seconds: float) -> dict[str, object]:
    """Figures of one planner, ready for JSON; pixels are those of a 64-pixel picture."""
    ticks = sum(len(e.distances) - 1 for e in episodes)
    ends = [64 * e.distances[-1] for e in episodes]
    return {
        "success": float(np.mean([e.reached for e in episodes])),
        "distance_px": float(np.mean(ends)),
        "distance_px_by_task": [round(end, 2) for end in ends],
        "ticks": ticks / len(episodes),
        "seconds_a_tick": seconds / max(ticks, 1),
    }


def marked(frame: Frames, goal: Floats) -> Frames:
    """A copy with a white ring where the toy is to go."""
    y, x = (np.mgrid[: frame.shape[0], : frame.shape[1]] + 0.5) / frame.shape[0]
    ring = np.abs(np.hypot(x - goal[0], y - goal[1]) - REACHED) < 0.5 / frame.shape[0]
    return np.where(ring[..., None], np.uint8(255), frame)


def draw(tasks: list[Task], played: dict[str, list[Episode]], out: Path) -> None:
    """A sheet of the first four tasks, and a film of the first four that the model solved with
    the rule."""
    rows = []
    for number, task in list(enumerate(tasks))[:4]:
        for name in ("model and rule", "oracle"):
            film = played[name][number].film[::4]
            rows.append((f"{name} {number}", [marked(frame, task.goal) for frame in film]))
    headings = [f"frame {4 * k}" for k in range(max(len(row) for _, row in rows))]
    write_png(out.with_suffix(".png"), contact_sheet(rows, scale=2, columns=headings))
    pairs = list(zip(tasks, played["model and rule"], strict=True))
    solved = [pair for pair in pairs if pair[1].reached] or pairs
    shots = [marked(frame, task.goal) for task, episode in solved[:4] for frame in episode.film]
    write_clip(out.with_suffix(".gif"), np.stack(shots).repeat(2, axis=1).repeat(2, axis=2), 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", type=int, default=24)
    parser.add_argument("--first", type=int, default=0, help="number of the first task")
    parser.add_argument("--ticks", type=int, default=15, help="latent steps a task may take")
    parser.add_argument("--model", default="toytable-int8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/push"), help="without a suffix")
    options = parser.parse_args()
    if options.tasks < 1 or options.ticks < 1 or options.first < 0:
        parser.error("--tasks and --ticks must be above 0, --first not below")
    torch.set_num_threads(1)  # so small a world gains nothing from more
    try:
        predictor = canvasmar_rt.load(options.model, threads=options.threads)
        for suffix in (".json", ".png", ".gif"):
            check_writable(options.out.with_suffix(suffix))
    except CanvasMarError as error:
        parser.error(str(error))
    # Rough futures do as well here as fine ones: docs/planning.md.
    predictor = canvasmar_rt.Predictor(
        predictor.engine,
        dataclasses.replace(predictor.sampling, ar_steps=1, flow_steps=2, temporal_guidance=1.0),
    )
    planners: dict[str, Callable[[Task], World | None]] = {
        "random": lambda task: None,
        "model": lambda task: Learned(predictor, task, 0),
        "rule": lambda task: Rule(predictor, task, CONTACT),
        "model and rule": lambda task: Learned(predictor, task, CONTACT),
        "oracle": Oracle,
    }
    tasks = [make_task(options.first + number) for number in range(options.tasks)]
    reports, played = {}, {}
    for name, make in planners.items():
        start = time.perf_counter()
        played[name] = [
            play(task, make(task), options.ticks, np.random.default_rng(number))
            for number, task in enumerate(tasks)
        ]
        reports[name] = report(played[name], time.perf_counter() - start)
        print(
            f"{name:14s} {reports[name]['success']:4.0%} of {len(tasks)} tasks, the toy ends "
            f"{reports[name]['distance_px']:.1f} px from the goal, "
            f"{reports[name]['seconds_a_tick']:.2f} s a tick",
            flush=True,
        )

    start_px = 64 * float(np.mean([e.distances[0] for e in played["random"]]))
    whole = {
        "first": options.first,
        "tasks": len(tasks),
        "ticks": options.ticks,
        "start_px": start_px,
        "planners": reports,
    }
    options.out.with_suffix(".json").write_text(json.dumps(whole, indent=1) + "\n")
    draw(tasks, played, options.out)


if __name__ == "__main__":
    main()
