"""The examples run from a clone, and the planner's parts do what they say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import canvasmar_rt
from canvasmar_rt.video import read_clip
from examples import plan_push as push
from examples import robot_loop
from training import toytable

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def task() -> push.Task:
    return push.make_task(3)


def test_planning_runs(tmp_path: Path) -> None:
    out = run("-m", "examples.plan_push", "--tasks", 1, "--ticks", 1, "--out", tmp_path / "push")
    planners = ["random", "model", "rule", "model and rule", "oracle"]
    assert re.findall(r"^([a-z ]+?) +\d+% of 1 tasks", out, re.MULTILINE) == planners
    report = json.loads((tmp_path / "push.json").read_text())
    assert {p["ticks"] == 1 for p in report["planners"].values()} == {True}
    assert 13 < report["start_px"] < 15
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".png", ".gif"}


def test_the_oracle_pushes_toys_to_their_goals() -> None:
    """With the truth to plan in, the planner does what it is asked."""
    for number in range(3):
        task = push.make_task(number)
        episode = push.play(task, push.Oracle(task), 15, np.random.default_rng(0))
        assert episode.reached
        assert len(episode.film) == 1 + 2 * (len(episode.distances) - 1)


def test_a_second_round_searches_where_the_first_was_good(task: push.Task) -> None:
    tried = []

    class Watched(push.Oracle):
        def imagine(self, moves: push.Floats) -> push.Future:
            future = super().imagine(moves)
            tried.append(push.cost(future, task.goal))
            return future

    push.plan(Watched(task), task.goal, np.random.default_rng(0))
    first, second = tried
    assert second.mean() < 0.9 * first.mean()


def test_positions_are_read_from_pixels() -> None:
    """Of real frames: the gripper's hue, and toys' where no arm hides them."""
    clips = toytable.generate(push.WORLD, batch=8, frames=6, seed=11)
    seen, area = push.centre(clips.frames[:, -1].numpy(), push.GRIPPER_HUE)
    assert (area > push.LEAST_AREA).all()
    assert 64 * np.abs(seen - clips.gripper[:, -1].numpy()).max() < 1
    blank = np.full((1, 64, 64, 3), 90, np.uint8)
    assert push.centre(blank, push.GRIPPER_HUE)[1] == 0


def test_the_imagined_gripper_goes_where_it_is_sent(task: push.Task) -> None:
    predictor = canvasmar_rt.load("toytable-int8", threads=1)
    start = task.state.gripper[0].numpy()
    inwards = 0.04 * np.sign(0.5 - start)
    moves = np.stack([np.zeros(2), inwards])
    world = push.Learned(predictor, task, contact=0)
    future = world.imagine(moves)
    assert future.gripper.shape == future.toy.shape == (2, push.HORIZON, 2)
    expected = start + 2 * push.HORIZON * moves
    assert 64 * np.linalg.norm(future.gripper[:, -1] - expected, axis=-1).max() < 6
    # nothing that is imagined changes what is known; what is observed does
    again = push.Learned(predictor, task, contact=0)
    again.imagine(-moves)
    np.testing.assert_array_equal(again.imagine(moves).gripper, future.gripper)
    state, seen = push.act(task.state, inwards)
    world.observe(inwards, seen, state)
    moved = world.imagine(moves).gripper[0, -1]
    assert 64 * np.linalg.norm(moved - state.gripper[0].numpy()) < 5


@pytest.mark.parametrize("simulated", [True, False])
def test_the_robot_loop_runs(tmp_path: Path, simulated: bool) -> None:
    """From the root with the simulator; elsewhere `training` is not found, and the clip plays."""
    where = ("-m", "examples.robot_loop") if simulated else (ROOT / "examples" / "robot_loop.py",)
    out = run(*where, "--seconds", "1", cwd=ROOT if simulated else tmp_path)
    assert ("simulator" if simulated else "recording") in out
    ticks = re.findall(r"^tick +\d+ +([\d.]+) ms  ar_steps (\d)  surprise +([\d.]+)", out, re.M)
    assert len(ticks) == 10
    assert max(float(surprise) for *_, surprise in ticks) < 25
    assert re.search(r"^10 ticks, missed \d+; prediction p50 [\d.]+ ms, worst", out, re.M)


def test_a_robot_that_stalled_does_not_act_in_a_burst(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten ticks a second, on a clock of the test's own."""
    now, acted = 0.0, []

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    class Stalling(robot_loop.Recording):
        def act(self, action: np.ndarray) -> np.ndarray:
            acted.append(now)
            sleep(2 if len(acted) == 3 else 0.01)
            return super().act(action)

    frames = np.zeros((1, 2, 64, 64, 3), np.uint8)
    prediction = SimpleNamespace(frames=frames, ar_steps=1, deadline_met=True)
    rollout = SimpleNamespace(
        latency=(),
        warmup=lambda **_: None,
        step=lambda *_, **__: prediction,
        observe=lambda frames: None,
    )
    predictor = SimpleNamespace(config=SimpleNamespace(action_dim=4), start=lambda _: rollout)
    clock = SimpleNamespace(perf_counter=lambda: now, sleep=sleep)
    monkeypatch.setattr(robot_loop, "time", clock)
    monkeypatch.setattr(robot_loop, "robot", Stalling)
    monkeypatch.setattr(canvasmar_rt, "load", lambda *_, **__: predictor)
    monkeypatch.setattr("sys.argv", ["robot_loop", "--seconds", "0.7"])
    robot_loop.main()
    np.testing.assert_allclose(np.diff(acted), [0.1, 0.1, 2.0, 0.1, 0.1, 0.1])
    assert "7 ticks, missed 1;" in capsys.readouterr().out


def test_the_game_loop_shows_the_arm_moving(tmp_path: Path) -> None:
    pytest.importorskip("pygame", reason="the game needs pygame")
    film = tmp_path / "game.mp4"
    options = ("--headless", "--frames", 8, "--budget", 10_000)
    out = run("-m", "examples.game_loop", *options, "--out", film)
    assert out.startswith("8 frames shown")
    frames = read_clip(film).frames
    assert frames.shape == (8, 256, 256, 3)
    seen, area = push.centre(frames, push.GRIPPER_HUE)
    assert (area[[0, -1]] > 16 * push.LEAST_AREA / 2).all()
    assert seen[-1, 0] < seen[0, 0] - 0.15  # the script begins with the left key
    run("-m", "examples.game_loop", "--headless", "--frames", 2, "--out", tmp_path / "game.png")
    assert (tmp_path / "game.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("example", "option", "value", "reason"),
    [
        ("robot_loop", "--rate", "0", "must be above 0"),
        ("game_loop", "--budget", "0", "must be above 0"),
        ("robot_loop", "--seconds", "nan", "no number of ticks"),
        ("robot_loop", "--rate", "inf", "no number of ticks"),
        ("robot_loop", "--model", "nowhere", "no such bundle directory"),
        ("game_loop", "--frames", "0", "must be above 0"),
        ("game_loop", "--threads", "0", "threads must lie in"),
        ("plan_push", "--tasks", "0", "must be above 0"),
        ("plan_push", "--model", "nowhere", "no such bundle directory"),
        ("plan_push", "--out", "/dev/null/push", "/dev/null"),
        ("robot_loop", "--model", "toytable-next-2-int8", "takes 8 numbers of action, not 4"),
    ],
)
def test_examples_refuse_what_they_cannot_run(
    example: str, option: str, value: str, reason: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"examples.{example}", option, value],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert reason in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", ["file/game.mp4", "game.avi", "game"])
def test_the_game_loop_is_not_played_for_a_film_that_cannot_be_written(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "file").touch()
    done = subprocess.run(
        [sys.executable, "-m", "examples.game_loop", "--headless", "--out", str(tmp_path / name)],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.search(rf"error: --out {re.escape(str(tmp_path / name))}: ", done.stderr)
    assert "Traceback" not in done.stderr
