"""ToyTable: the world's rules, its drawing, and what can be read back from pixels."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from canvasmar_rt.errors import ConfigError, InputError
from training import toytable
from training.toytable import (
    SHAPES,
    PolicyState,
    ToyClips,
    ToyTableConfig,
    WorldState,
    clamp_action,
    generate,
    gripper_from_pixels,
    policy,
    policy_noise,
    render,
    reset,
    start_policy,
    step,
)

CONFIG = ToyTableConfig()


@pytest.fixture(scope="module")
def clips() -> ToyClips:
    return generate(CONFIG, batch=24, frames=17, seed=7)


def one_toy(shape: str, *, at: tuple[float, float], gripper: tuple[float, float]) -> WorldState:
    """A world with a single unturned toy, and the gripper where it is wanted."""
    state = reset(ToyTableConfig(min_toys=1, max_toys=1), batch=1, seed=0)
    return replace(
        state,
        toys=torch.tensor([[at]]),
        toy_angle=torch.zeros(1, 1),
        toy_shape=torch.tensor([[SHAPES.index(shape)]]),
        toy_radius=torch.full((1, 1), 0.1),
        gripper=torch.round(torch.tensor([gripper]) * 65536) / 65536,
    )


def drive(state: WorldState, action: tuple[float, float], frames: int) -> WorldState:
    for _ in range(frames):
        state = step(CONFIG, state, torch.tensor([action]))
    return state


# Randomness


def test_a_seed_gives_the_same_clips_and_another_seed_others(clips: ToyClips) -> None:
    again = generate(CONFIG, batch=24, frames=17, seed=7)
    for field in fields(ToyClips):
        assert torch.equal(getattr(clips, field.name), getattr(again, field.name)), field.name
    other = generate(CONFIG, batch=24, frames=17, seed=8)
    for i in range(24):
        assert not torch.equal(clips.frames[i], other.frames[i])
        assert not torch.equal(clips.gripper[i, 0], other.gripper[i, 0])


def test_clips_of_a_batch_differ(clips: ToyClips) -> None:
    starts = clips.frames[:, 0].flatten(1).float()
    distance = torch.cdist(starts, starts) + 1e9 * torch.eye(24)
    assert distance.min() > 500


def test_a_clip_does_not_depend_on_its_batch(clips: ToyClips) -> None:
    for i in (0, 5, 23):
        alone = generate(CONFIG, batch=1, frames=17, seed=7, first_clip=i)
        # The draws are the same; vectorised arithmetic may round the last bits otherwise.
        torch.testing.assert_close(alone.toys[0], clips.toys[i], rtol=0, atol=1e-4)
        torch.testing.assert_close(alone.actions[0], clips.actions[i], rtol=0, atol=1e-4)
        difference = (alone.frames[0].int() - clips.frames[i].int()).abs()
        assert difference.max() <= 2


def test_a_longer_clip_begins_with_the_shorter_one(clips: ToyClips) -> None:
    short = generate(CONFIG, batch=24, frames=5, seed=7)
    assert torch.equal(short.frames, clips.frames[:, :5])
    assert torch.equal(short.actions, clips.actions[:, :4])


def test_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    generate(CONFIG, batch=2, frames=3, seed=1)
    assert torch.equal(before, torch.random.get_rng_state())


# Shapes, limits and actions


def test_shapes_and_dtypes(clips: ToyClips) -> None:
    n = CONFIG.max_toys
    expected = {
        "frames": ((24, 17, 64, 64, 3), torch.uint8),
        "actions": ((24, 16, 2), torch.float32),
        "gripper": ((24, 17, 2), torch.float32),
        "toys": ((24, 17, n, 2), torch.float32),
        "toy_angle": ((24, 17, n), torch.float32),
        "toy_mask": ((24, n), torch.bool),
    }
    for name, (shape, dtype) in expected.items():
        tensor = getattr(clips, name)
        assert tuple(tensor.shape) == shape, name
        assert tensor.dtype == dtype, name
    assert set(clips.toy_mask.sum(-1).tolist()) == {3, 4, 5}


def test_a_single_frame_has_no_actions() -> None:
    clip = generate(CONFIG, batch=2, frames=1, seed=0)
    assert clip.actions.shape == (2, 0, 2)
    assert clip.frames.shape == (2, 1, 64, 64, 3)


def test_recorded_actions_are_the_executed_ones(clips: ToyClips) -> None:
    assert torch.equal(clips.gripper[:, 1:], clips.gripper[:, :-1] + clips.actions)
    assert torch.equal(clips.gripper[:, 1:] - clips.gripper[:, :-1], clips.actions)
    on_grid = clips.actions * 65536
    assert torch.equal(on_grid, on_grid.round())
    assert clips.actions.norm(dim=-1).max() <= CONFIG.max_speed + 1e-4


def test_recorded_actions_replay_the_clip(clips: ToyClips) -> None:
    state = reset(CONFIG, batch=24, seed=7)
    for t in range(16):
        state = step(CONFIG, state, clips.actions[:, t])
    torch.testing.assert_close(state.gripper, clips.gripper[:, -1], rtol=0, atol=2e-4)
    moved = (state.toys - clips.toys[:, -1]).norm(dim=-1)[clips.toy_mask]
    assert moved.median() < 1e-3


def test_actions_are_clamped_at_the_limits_of_the_table() -> None:
    state = reset(CONFIG, batch=4, seed=3)
    for _ in range(40):
        state = step(
            CONFIG, state, torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        )
    assert state.gripper[0, 0] == 0.90625
    assert state.gripper[1, 0] == 0.09375
    assert state.gripper[2, 1] == 0.90625
    assert state.gripper[3, 1] == 0.140625
    still = clamp_action(CONFIG, state, torch.tensor([[1.0, 0.0]] * 4))
    assert still[0].tolist() == [0.0, 0.0]
    assert still[1].tolist() == pytest.approx([CONFIG.max_speed, 0.0], abs=1e-5)


def test_toys_stay_on_the_table() -> None:
    config = replace(CONFIG, size=16)
    clips = generate(config, batch=64, frames=40, seed=11)
    radius = reset(config, batch=64, seed=11).toy_radius[:, None, :, None]
    inside = (clips.toys >= radius + config.rim - 1e-6) & (
        clips.toys <= 1 - radius - config.rim + 1e-6
    )
    assert bool(inside.all(dim=-1).movedim(1, -1)[clips.toy_mask].all())
    assert bool(clips.toys.isfinite().all())


def test_a_fresh_world_is_at_rest_without_overlaps() -> None:
    state = reset(CONFIG, batch=64, seed=5)
    after = drive_still(state, 10)
    moved = (after.toys - state.toys).norm(dim=-1)[state.toy_mask]
    assert (moved == 0).float().mean() > 0.95
    assert moved.max() < 0.03


def drive_still(state: WorldState, frames: int) -> WorldState:
    for _ in range(frames):
        state = step(CONFIG, state, torch.zeros_like(state.gripper))
    return state


# Dynamics


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("direction", [(1.0, 0.0), (0.0, -1.0), (0.6, 0.8)])
def test_pushing_moves_a_toy_in_the_direction_of_the_push(
    shape: str, direction: tuple[float, float]
) -> None:
    dx, dy = direction
    start = one_toy(shape, at=(0.5, 0.5), gripper=(0.5 - 0.2 * dx, 0.5 - 0.2 * dy))
    end = drive(start, (0.03 * dx, 0.03 * dy), 9)
    way = (end.toys - start.toys)[0, 0]
    forward, sideways = float(way[0] * dx + way[1] * dy), float(way[1] * dx - way[0] * dy)
    assert forward > 0.06
    assert abs(sideways) < 0.75 * forward
    # The gripper has not gone through it.
    assert distance_to_toy(end) > CONFIG.gripper_radius - 0.012


def distance_to_toy(state: WorldState) -> float:
    offset = (state.gripper - state.toys[:, 0])[0]
    form = toytable._form(state.toy_shape)[0, 0]
    return float(
        toytable._toy_distance(
            offset[0], offset[1], state.toy_angle[0, 0], state.toy_radius[0, 0], form
        )
    )


@pytest.mark.parametrize(("side", "sign"), [(0.05, -1.0), (-0.05, 1.0)])
def test_an_off_centre_push_turns_a_toy(side: float, sign: float) -> None:
    start = one_toy("square", at=(0.5, 0.5), gripper=(0.3, 0.5 + side))
    start = replace(start, toy_angle=torch.full((1, 1), math.pi / 4))  # a flat face to the left
    end = drive(start, (0.03, 0.0), 5)
    assert float(end.toy_angle - start.toy_angle) * sign > 0.1
    disc = drive(one_toy("disc", at=(0.5, 0.5), gripper=(0.3, 0.5 + side)), (0.03, 0.0), 5)
    assert disc.toy_angle.abs().max() < 2e-2


def test_toys_at_rest_stay_still_without_contact() -> None:
    start = one_toy("star", at=(0.25, 0.75), gripper=(0.7, 0.3))
    end = drive(start, (0.01, 0.01), 12)
    assert torch.equal(end.toys, start.toys)
    assert torch.equal(end.toy_angle, start.toy_angle)


def test_friction_stops_a_sliding_toy() -> None:
    start = one_toy("disc", at=(0.3, 0.7), gripper=(0.7, 0.2))
    start = replace(start, toy_velocity=torch.tensor([[[0.05, 0.0]]]))
    early, late = drive(start, (0.0, 0.0), 3), drive(start, (0.0, 0.0), 20)
    assert 0.03 < float(early.toys[0, 0, 0] - 0.3) < float(late.toys[0, 0, 0] - 0.3) < 0.2
    assert late.toy_velocity.abs().max() == 0


def test_a_toy_pushes_another() -> None:
    state = reset(ToyTableConfig(min_toys=2, max_toys=2), batch=1, seed=0)
    state = replace(
        state,
        toys=torch.tensor([[[0.4, 0.5], [0.62, 0.5]]]),
        toy_shape=torch.zeros(1, 2, dtype=torch.long),
        toy_radius=torch.full((1, 2), 0.1),
        gripper=torch.tensor([[0.25, 0.5]]),
    )
    end = drive(state, (0.03, 0.0), 8)
    assert end.toys[0, 1, 0] - state.toys[0, 1, 0] > 0.05
    apart = end.toys[0, 1, 0] - end.toys[0, 0, 0]
    assert apart > 2 * 0.082 - 0.01


def test_a_toy_caught_at_a_wall_does_not_leap() -> None:
    state = one_toy("disc", at=(0.84, 0.5), gripper=(0.7, 0.5))
    for _ in range(20):
        after = step(CONFIG, state, torch.tensor([[0.05, 0.001]]))
        assert (after.toys - state.toys).norm() < 2.5 * CONFIG.max_speed
        assert after.toys[0, 0, 0] <= 0.97 - 0.1 + 1e-6
        state = after


def test_step_is_pure() -> None:
    state = reset(CONFIG, batch=3, seed=2)
    before = {f.name: getattr(state, f.name).clone() for f in fields(WorldState)}
    step(CONFIG, state, torch.full((3, 2), 0.05))
    render(CONFIG, state)
    for name, tensor in before.items():
        assert torch.equal(tensor, getattr(state, name)), name


def test_the_forearm_ends_at_the_gripper() -> None:
    state = reset(CONFIG, batch=256, seed=4)
    elbow = toytable._elbow(state)
    for joint in (state.arm_base, state.gripper):
        length = (elbow - joint).norm(dim=-1)
        torch.testing.assert_close(length, torch.full_like(length, toytable._LINK))


# Policy


def test_the_policy_pushes_wanders_and_rests(clips: ToyClips) -> None:
    moved = ((clips.toys[:, -1] - clips.toys[:, 0]).norm(dim=-1) * clips.toy_mask).amax(-1)
    assert (moved > 0.1).float().mean() > 0.4
    for share, low, high in (((1.0, 0.0), 0.02, 0.06), ((0.0, 1.0), 0.005, 0.06)):
        config = replace(CONFIG, size=16, push_share=share[0], wander_share=share[1])
        speed = generate(config, batch=32, frames=9, seed=1).actions.norm(dim=-1).mean()
        assert low < speed < high
    resting = replace(CONFIG, size=16, push_share=0.0, wander_share=0.0)
    assert generate(resting, batch=4, frames=9, seed=1).actions.abs().max() == 0


def test_the_policy_is_a_pure_function_of_state_and_noise() -> None:
    state = reset(CONFIG, batch=5, seed=2)
    noise = policy_noise(batch=5, steps=3, seed=2)
    assert noise.shape == (3, 5, 8)
    first, next_first = policy(CONFIG, state, start_policy(state), noise[0])
    second, next_second = policy(CONFIG, state, start_policy(state), noise[0])
    assert torch.equal(first, second)
    for field in fields(PolicyState):
        assert torch.equal(getattr(next_first, field.name), getattr(next_second, field.name))


# Drawing


def polygon(shape: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Corners of a shape's core for radius 1, unrounded, from first principles."""
    points, m, core, *_ = toytable._SHAPE_TABLE[shape]
    spoke, bend = math.pi / points, math.pi / m
    inner = core * (math.cos(spoke) - math.sin(spoke) * math.cos(bend) / math.sin(bend))
    corners = []
    for k in range(int(points)):
        for radius, turn in ((core, 2 * k * spoke), (inner, (2 * k + 1) * spoke)):
            corners.append((radius * math.sin(turn), radius * math.cos(turn)))
    return np.array(corners)


@pytest.mark.parametrize("shape", ["square", "triangle", "hexagon", "star"])
def test_distance_to_a_polygon_matches_brute_force(shape: str) -> None:
    corners = polygon(shape)
    rng = np.random.default_rng(0)
    p = rng.uniform(-1.5, 1.5, (500, 2))
    start, way = corners, np.roll(corners, -1, axis=0) - corners
    offset = p[:, None] - start
    share = np.clip((offset * way).sum(-1) / (way**2).sum(-1), 0, 1)
    distance = np.linalg.norm(offset - share[..., None] * way, axis=-1).min(-1)
    end = start + way
    crosses = (start[:, 1] > p[:, None, 1]) != (end[:, 1] > p[:, None, 1])
    with np.errstate(divide="ignore", invalid="ignore"):
        at = start[:, 0] + (p[:, None, 1] - start[:, 1]) * way[:, 0] / way[:, 1]
    inside = ((p[:, None, 0] < at) & crosses).sum(-1) % 2 == 1
    expected = np.where(inside, -distance, distance) - toytable._SHAPE_TABLE[shape][4]

    form = toytable._form(torch.tensor(SHAPES.index(shape)))
    points = torch.tensor(p, dtype=torch.float32)
    found = toytable._toy_distance(
        points[:, 0], points[:, 1], torch.zeros(()), torch.ones(()), form
    )
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("size", [32, 64, 100])
def test_render_has_the_size_asked_for(size: int) -> None:
    config = ToyTableConfig(size=size)
    frames = render(config, reset(config, batch=2, seed=0))
    assert frames.shape == (2, size, size, 3)
    assert frames.dtype == torch.uint8
    assert frames.float().std() > 20


def test_rendering_keeps_within_range_and_is_mostly_unsaturated(clips: ToyClips) -> None:
    brightness = clips.frames.float().mean((1, 2, 3, 4))
    assert brightness.min() > 40
    assert brightness.max() < 225
    assert (clips.frames == 255).float().mean() < 0.1


def test_edges_are_anti_aliased() -> None:
    """A toy that moves by a quarter of a pixel changes its edge by a quarter of a step."""
    state = one_toy("disc", at=(0.5, 0.6), gripper=(0.2, 0.3))
    state = replace(
        state,
        toy_colour=torch.tensor([[[0.9, 0.9, 0.1]]]),
        table_colour=torch.full((1, 2, 3), 0.3),
        table_noise=torch.zeros_like(state.table_noise),
        light_slope=torch.zeros(1),
        light_colour=torch.ones(1, 3),
    )

    def red_area(shift: float) -> float:
        moved = replace(state, toys=state.toys + torch.tensor([shift / 64, 0.0]))
        return float(red_row(render(CONFIG, moved)).sum())

    def red_row(frame: Tensor) -> Tensor:
        return frame[0, 38, :, 0].float() - frame[0, 38, :, 2].float()

    row = red_row(render(CONFIG, state))
    partial = (row > 0.08 * row.max()) & (row < 0.85 * row.max())
    assert 2 <= int(partial.sum()) <= 8
    areas = [red_area(shift) for shift in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert max(areas) - min(areas) < 0.05 * areas[0]


def test_half_size_agrees_with_full_size_scaled_down() -> None:
    state = reset(CONFIG, batch=8, seed=6)
    small = render(ToyTableConfig(size=64), state).float()
    large = render(ToyTableConfig(size=256), state).float()
    pooled = large.reshape(8, 64, 4, 64, 4, 3).mean((2, 4))
    assert (small - pooled).abs().mean() < 4


def test_the_arm_is_drawn_above_toys() -> None:
    clear = one_toy("disc", at=(0.5, 0.8), gripper=(0.5, 0.5))
    elbow = toytable._elbow(clear)
    middle = ((elbow + clear.gripper) / 2)[0]
    covered = replace(clear, toys=middle.reshape(1, 1, 2))
    row, column = (int(v * 64) for v in (middle[1], middle[0]))
    assert torch.equal(
        render(CONFIG, clear)[0, row, column], render(CONFIG, covered)[0, row, column]
    )


# Reading back


def test_gripper_is_read_from_pixels(clips: ToyClips) -> None:
    error = (gripper_from_pixels(clips.frames) - clips.gripper).norm(dim=-1) * 64
    assert error.mean() < 0.2
    assert error.max() < 1.0


def test_gripper_is_read_from_blurred_and_noisy_frames(clips: ToyClips) -> None:
    frames = clips.frames.float() / 255
    flat = frames.flatten(0, 1).movedim(-1, 1)
    blurred = torch.nn.functional.avg_pool2d(flat, 3, 1, 1, count_include_pad=False)
    noise = 0.04 * torch.randn(blurred.shape, generator=torch.Generator().manual_seed(0))
    dirty = (blurred + noise).clamp(0, 1).movedim(1, -1).reshape(frames.shape)
    error = (gripper_from_pixels(dirty) - clips.gripper).norm(dim=-1) * 64
    assert error.nanmean() < 1.5
    assert error.isnan().float().mean() < 0.02


def test_no_gripper_reads_as_nan() -> None:
    assert gripper_from_pixels(torch.full((2, 64, 64, 3), 90, dtype=torch.uint8)).isnan().all()


# Mistakes


@pytest.mark.parametrize(
    "bad",
    [
        {"size": 4},
        {"min_toys": 4, "max_toys": 3},
        {"max_toys": 9},
        {"max_speed": 0.0},
        {"push_share": 0.9, "wander_share": 0.2},
        {"substeps": 0},
    ],
)
def test_a_bad_config_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="ToyTableConfig"):
        ToyTableConfig(**bad)  # type: ignore[arg-type]


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match="frames"):
        generate(CONFIG, batch=1, frames=0, seed=0)
    with pytest.raises(ConfigError, match="batch"):
        reset(CONFIG, batch=0, seed=0)
    with pytest.raises(InputError, match="action"):
        step(CONFIG, reset(CONFIG, batch=2, seed=0), torch.zeros(2, 3))
    with pytest.raises(InputError, match="frames"):
        gripper_from_pixels(torch.zeros(2, 3, 64, 64))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_draws_the_same_worlds() -> None:
    cpu = generate(CONFIG, batch=8, frames=3, seed=7)
    cuda = generate(CONFIG, batch=8, frames=3, seed=7, device="cuda")
    difference = (cpu.frames.int() - cuda.frames.cpu().int()).abs()
    assert difference.float().mean() < 0.5
