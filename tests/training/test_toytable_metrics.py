"""ToyTable metrics: they tell true clips from every failure that matters, and from no other."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from scipy import ndimage
from torch import Tensor
from typer.testing import CliRunner

from canvasmar_rt.errors import ConfigError, InputError
from training import toytable_metrics
from training.metrics import GaussianStats
from training.toytable import (
    ToyTableConfig,
    WorldState,
    generate,
    policy,
    policy_noise,
    render,
    reset,
    start_policy,
    step,
)
from training.toytable_metrics import (
    FEATURES,
    HELD_OUT_SEED,
    METRIC_FILE,
    TRAIN_SEED,
    MetricCard,
    ToyTableEvaluator,
    app,
    colourfulness,
    gripper_errors,
    metric_net,
    pair_features,
    sharpness,
    toy_areas,
    toys_kept,
)

CONFIG = ToyTableConfig()
CLIPS, FRAMES = 320, 4


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """Clips whose states are known, so that they can be drawn otherwise."""

    frames: Tensor
    actions: Tensor
    states: tuple[WorldState, ...]

    def redrawn(self, change: Callable[[WorldState], WorldState]) -> Tensor:
        return torch.stack([render(CONFIG, change(state)) for state in self.states], dim=1)


def simulate(seed: int, *, clips: int, frames: int) -> Simulated:
    state = reset(CONFIG, batch=clips, seed=seed)
    noise = policy_noise(batch=clips, steps=frames - 1, seed=seed)
    operator, states = start_policy(state), [state]
    for row in noise:
        action, operator = policy(CONFIG, state, operator, row)
        state = step(CONFIG, state, action)
        states.append(state)
    gripper = torch.stack([s.gripper for s in states], dim=1)
    return Simulated(
        frames=torch.stack([render(CONFIG, s) for s in states], dim=1),
        actions=gripper[:, 1:] - gripper[:, :-1],
        states=tuple(states),
    )


def without_first_toy(state: WorldState) -> WorldState:
    mask = state.toy_mask.clone()
    mask[:, 0] = False
    return replace(state, toy_mask=mask)


def first_toy_recoloured(state: WorldState) -> WorldState:
    """The first toy takes the opposite colour."""
    colour = state.toy_colour.clone()
    colour[:, 0] = 1.05 - colour[:, 0]
    return replace(state, toy_colour=colour.clamp(0, 1))


def blurred(frames: Tensor, sigma: float) -> Tensor:
    return torch.from_numpy(ndimage.gaussian_filter(frames.numpy(), (0, 0, sigma, sigma, 0)))


def greyed(frames: Tensor) -> Tensor:
    return frames.float().mean(-1, keepdim=True).expand(frames.shape).to(torch.uint8)


def noise_like(frames: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, frames.shape, dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def short() -> Simulated:
    return simulate(5002, clips=CLIPS, frames=FRAMES)


@pytest.fixture(scope="module")
def long() -> Simulated:
    """100 frames after a context of 5."""
    return simulate(77, clips=40, frames=105)


# The Fréchet distance


def toytable_frechet(real: Tensor, generated: Tensor) -> float:
    sides = GaussianStats(), GaussianStats()
    for stats, clips in zip(sides, (real, generated), strict=True):
        stats.update(pair_features(clips).flatten(0, 1))
    return sides[0].distance(sides[1])


def test_frechet_tells_failures_from_other_true_clips(short: Simulated) -> None:
    other = generate(CONFIG, batch=CLIPS, frames=FRAMES, seed=5001).frames
    between_true = toytable_frechet(other, short.frames)
    assert between_true < 3.5
    failures = {
        "blurred": blurred(short.frames, 1.5),
        "grey": greyed(short.frames),
        "noise": noise_like(short.frames),
        "frozen": short.frames[:, :1].expand(-1, FRAMES, -1, -1, -1),
        "a toy removed": short.redrawn(without_first_toy),
        "frames out of order": short.frames[:, [0, 3, 1, 2]],
    }
    distances = {name: toytable_frechet(other, clips) for name, clips in failures.items()}
    assert all(distance > 3 * between_true for distance in distances.values()), (
        between_true,
        distances,
    )


def test_features(short: Simulated) -> None:
    features = pair_features(short.frames, chunk=100)
    assert features.shape == (CLIPS, FRAMES - 1, FEATURES)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features[:3, 1:2], pair_features(short.frames[:3, 1:3]))
    flat = features.flatten(0, 1)
    assert float(flat.mean(0).abs().max()) < 0.3
    assert 0.8 < float(flat.std(0).min()) <= float(flat.std(0).max()) < 1.25


def test_features_refuse_other_frames(short: Simulated) -> None:
    for bad in (short.frames[:, :1], short.frames[:, :, ::2, ::2], short.frames.float()):
        with pytest.raises(InputError, match=r"pair_features: frames must be uint8 .*64, 64, 3"):
            pair_features(bad)


def test_the_networks_readings_on_fresh_clips(short: Simulated) -> None:
    pairs = short.frames[:, 1:3]
    readings = metric_net().readings(metric_net()(pairs))
    gripper = readings["gripper"] / 4 + 0.5
    action = readings["action"] / 30
    count = readings["count"].squeeze(-1) + 4
    state = short.states[2]
    assert float((gripper - state.gripper).norm(dim=-1).mean()) * 64 < 1.2
    assert float((action - short.actions[:, 1]).norm(dim=-1).mean()) * 64 < 0.3
    assert float((count - state.toy_mask.sum(-1)).abs().mean()) < 0.25


def metric_card(path: Path) -> MetricCard:
    with safe_open(path, framework="pt") as file:
        return MetricCard(**json.loads(file.metadata()["card"]))


def test_the_shipped_file() -> None:
    card = metric_card(METRIC_FILE)
    assert METRIC_FILE.stat().st_size < 1.5e6
    assert (card.seed, TRAIN_SEED, HELD_OUT_SEED) == (9_000, 9_000, 9_001)
    assert card.gripper_px < 1
    assert card.frozen_action_px < 0.2
    assert card.occupancy_r2 > 0.9


def test_a_file_that_is_no_metric(tmp_path: Path) -> None:
    path = tmp_path / "none.safetensors"
    with pytest.raises(ConfigError, match="toytable_metrics train --out FILE"):
        metric_net(path)


# The gripper


def test_gripper_follows_the_actions_on_true_clips(long: Simulated) -> None:
    errors = gripper_errors(long.frames[:16, :5], long.frames[:16, 5:], long.actions[:16, 4:])
    assert errors.shape == (16, 100)
    assert float(errors.mean()) < 0.08
    assert float(errors.max()) < 0.5


def test_gripper_errors_have_the_size_of_what_is_wrong(long: Simulated) -> None:
    context, frames, actions = long.frames[:8, :5], long.frames[:8, 5:15], long.actions[:8, 4:14]
    moved = actions.clone()
    moved[:, 3] += torch.tensor([0.0625, 0.0])  # 4 pixels
    errors = gripper_errors(context, frames, moved).mean(0)
    assert float(errors[:3].max()) < 0.2
    torch.testing.assert_close(errors[3:], torch.full((7,), 4.0), atol=0.2, rtol=0)

    frozen = gripper_errors(context, context[:, -1:].expand_as(frames), actions)
    torch.testing.assert_close(frozen, actions.cumsum(1).norm(dim=-1) * 64, atol=0.01, rtol=0)
    grey = gripper_errors(context, greyed(frames), actions)
    assert bool(grey.isnan().all())


def test_gripper_errors_refuse_what_does_not_fit(long: Simulated) -> None:
    context, frames, actions = long.frames[:2, :5], long.frames[:2, 5:9], long.actions[:2, 4:8]
    with pytest.raises(InputError, match=r"actions \(2, 4, 2\), one a predicted frame"):
        gripper_errors(context, frames, actions[:, 1:])
    context = context.clone()
    context[1] = 90
    with pytest.raises(InputError, match="clip 1 shows no gripper"):
        gripper_errors(context, frames, actions)


# Toys


def test_true_clips_keep_their_toys(long: Simulated) -> None:
    toys = toys_kept(long.frames[:, :5], long.frames[:, 5:])
    there = int(long.states[0].toy_mask.sum())
    assert 0.98 * there <= int(toys.seen.sum()) <= there
    assert int(toys.kept.sum()) >= 0.97 * int(toys.seen.sum())
    assert float(toys.share.mean()) >= 0.97
    assert int(toys.extra.sum()) <= 2
    for textures in range(4):
        some = long.states[0].table_kind == textures
        assert float(toys.share[some].mean()) >= 0.95


@pytest.mark.parametrize("change", [without_first_toy, first_toy_recoloured])
def test_a_toy_removed_or_recoloured_is_lost(
    change: Callable[[WorldState], WorldState],
) -> None:
    few = simulate(11, clips=64, frames=3)
    context, predicted = few.frames[:, :2], few.redrawn(change)[:, 2:]
    toys, true = toys_kept(context, predicted), toys_kept(context, few.frames[:, 2:])
    bare = toy_areas(torch.stack([few.frames[:, 0], few.redrawn(without_first_toy)[:, 0]], dim=1))
    visible = (bare[:, 0] > bare[:, 1] + 12).any(-1)
    assert int(visible.sum()) > 0.9 * 64
    assert not bool(toys.all_kept[visible].any())
    lost = true.kept.sum(-1) - toys.kept.sum(-1)
    assert float((lost[visible] == 1).float().mean()) > 0.98
    if change is without_first_toy:
        assert not bool((toys.extra & ~true.extra).any())


def test_neither_noise_nor_grey_keeps_a_toy(long: Simulated) -> None:
    context, frames = long.frames[:16, :5], long.frames[:16, 5:13]
    for spoilt in (noise_like(frames), greyed(frames)):
        toys = toys_kept(context, spoilt)
        assert not bool(toys.kept.any())
        assert not bool(toys.extra.any())


def test_toys_kept_refuses_what_does_not_fit(long: Simulated) -> None:
    frames = long.frames[:2, :5]
    with pytest.raises(InputError, match="same clips and size"):
        toys_kept(frames, frames[:1])
    with pytest.raises(InputError, match="toys_kept predicted: frames must be uint8"):
        toys_kept(frames, frames[0])


# Drift


def test_colourfulness_and_sharpness(short: Simulated) -> None:
    frames = short.frames[:8]
    assert colourfulness(frames).shape == sharpness(frames).shape == (8, FRAMES)
    x = frames.numpy().astype(float)
    np.testing.assert_allclose(
        colourfulness(frames), (x.max(-1) - x.min(-1)).mean((-1, -2)) / 255, rtol=1e-5
    )
    grey = x.mean(-1)
    detail = (grey - ndimage.uniform_filter(grey, (0, 0, 3, 3)))[..., 1:-1, 1:-1]
    np.testing.assert_allclose(sharpness(frames), (detail**2).mean((-1, -2)), rtol=1e-4)
    assert float(colourfulness(greyed(frames)).max()) == 0
    assert bool((sharpness(blurred(frames, 1.0)) < 0.5 * sharpness(frames)).all())
    assert bool((sharpness(noise_like(frames)) > 5 * sharpness(frames)).all())


# All of it


def test_report_of_true_clips_and_of_failures(long: Simulated) -> None:
    context, real, actions = long.frames[:16, 2:5], long.frames[:16, 5:13], long.actions[:16, 4:12]

    def report(predicted: Tensor, batch: int) -> toytable_metrics.ToyTableReport:
        evaluator = ToyTableEvaluator()
        for i in range(0, len(real), batch):
            rows = slice(i, i + batch)
            evaluator.update(context[rows], predicted[rows], real[rows], actions[rows])
        return evaluator.report()

    true = report(real, 16)
    assert (true.clips, true.frames) == (16, 8)
    assert true.frechet == pytest.approx(0, abs=1e-6)
    assert true.gripper_px == true.true_gripper_px == pytest.approx(true.gripper_penalised_px)
    assert true.toys_kept == true.true_toys_kept
    assert true.colour_ratio_by_frame == true.sharpness_ratio_by_frame == (1.0,) * 8
    assert json.loads(json.dumps(asdict(true)))["clips"] == 16

    frozen = report(context[:, -1:].expand_as(real), 7)
    assert frozen.frechet > 3
    assert frozen.gripper_px == pytest.approx(frozen.frozen_gripper_px, abs=0.05)
    assert frozen.true_gripper_px == pytest.approx(true.gripper_px)

    grey = report(greyed(real), 16)
    assert (grey.gripper_px, grey.gripper_missing, grey.toys_kept) == (None, 1.0, 0.0)
    assert grey.gripper_penalised_px == 32
    assert grey.gripper_px_by_frame == (None,) * 8
    assert max(r for r in grey.colour_ratio_by_frame if r is not None) == 0


def test_report_is_what_its_fields_say() -> None:
    """Means over clips and frames of a mixture, whatever the batches."""
    clips = generate(CONFIG, batch=12, frames=9, seed=6)
    context, real, actions = clips.frames[:, :3], clips.frames[:, 3:], clips.actions[:, 2:]
    assert actions is not None
    predicted = real.clone()
    predicted[:4] = context[:4, -1:]
    predicted[4:6, 2:], predicted[6:7] = greyed(real[4:6, 2:]), greyed(real[6:7])
    predicted[7:9] = blurred(real[7:9], 2.0)
    evaluator = ToyTableEvaluator()
    for rows in (slice(0, 5), slice(5, 6), slice(6, 12)):
        evaluator.update(context[rows], predicted[rows], real[rows], actions[rows])
    report = asdict(evaluator.report())

    errors, toys = gripper_errors(context, predicted, actions), toys_kept(context, predicted)
    ahead = [torch.cat([context[:, -1:], frames], dim=1) for frames in (real, predicted)]
    assert 0 < float(errors.isnan().float().mean()) < 1
    assert len(set(toys.share.tolist())) > 2
    want = {
        "frechet": toytable_frechet(ahead[0], ahead[1]),
        "gripper_px": float(errors.nanmean()),
        "gripper_penalised_px": float(errors.nan_to_num(32).mean()),
        "gripper_missing": float(errors.isnan().float().mean()),
        "gripper_px_by_frame": tuple(errors.nanmean(0).tolist()),
        "frozen_gripper_px": float(actions.cumsum(1).norm(dim=-1).mean()) * 64,
        "toys_kept": float(toys.share.nanmean()),
        "all_toys_kept": float(toys.all_kept.float().mean()),
        "extra_toys": float(toys.extra.sum()) / 12,
        "colour_ratio_by_frame": tuple(
            (colourfulness(predicted).mean(0) / colourfulness(real).mean(0)).tolist()
        ),
        "sharpness_ratio_by_frame": tuple(
            (sharpness(predicted).mean(0) / sharpness(real).mean(0)).tolist()
        ),
    }
    for name, value in want.items():
        assert report[name] == pytest.approx(value, rel=1e-4), name


def test_evaluator_refuses_what_does_not_fit(long: Simulated) -> None:
    context, real, actions = long.frames[:2, :5], long.frames[:2, 5:9], long.actions[:2, 4:8]
    evaluator = ToyTableEvaluator()
    with pytest.raises(InputError, match="at least 2 samples"):
        evaluator.report()
    evaluator.update(context, real, real, actions)
    with pytest.raises(InputError, match="after clips of 4 frames"):
        evaluator.update(context, real[:, :3], real[:, :3], actions[:, :3])
    with pytest.raises(InputError, match="must both be"):
        evaluator.update(context, real, real[:, :3], actions)


# Training the network


def test_blur_agrees_with_scipy(short: Simulated) -> None:
    frames = short.frames[:3, :2]
    sigma = torch.tensor([0.4, 1.0, 2.0])
    got = toytable_metrics._blur(frames.float(), sigma)
    for row, s in zip(range(3), sigma.tolist(), strict=True):
        image = frames[row].numpy().astype(float)
        expected = ndimage.gaussian_filter(image, (0, s, s, 0), radius=(0, 7, 7, 0), mode="nearest")
        np.testing.assert_allclose(got[row], expected, atol=1e-2)


def test_targets_say_what_the_simulator_says() -> None:
    pool = toytable_metrics._make_pool(3, 4)
    clip, zero = torch.arange(4), torch.zeros(4, dtype=torch.long)
    frames, targets = pool.pairs(clip, zero, zero + 2)
    sizes = list(toytable_metrics._HEADS.values())
    parts = dict(zip(toytable_metrics._HEADS, torch.split(targets, sizes, dim=-1), strict=True))
    true = generate(CONFIG, batch=4, frames=3, seed=3)
    np.testing.assert_array_equal(frames, true.frames[:, [0, 2]])
    np.testing.assert_allclose(parts["action"] / 30, true.actions.sum(1), atol=1e-6)
    share = parts["occupancy"].reshape(4, 8, 8) / 4
    np.testing.assert_allclose(share.sum((1, 2)), true.toy_mask.sum(1), atol=1e-5)
    # The shares of a toy balance at its centre.
    line = (torch.arange(8) + 0.5) / 8
    centre = (true.toys[:, 2] * true.toy_mask.unsqueeze(-1)).sum(1)
    np.testing.assert_allclose((share * line).sum((1, 2)), centre[:, 0], atol=1e-5)
    np.testing.assert_allclose((share * line[:, None]).sum((1, 2)), centre[:, 1], atol=1e-5)


def test_training_is_repeatable_and_its_file_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toytable_metrics, "_HELD_OUT_CLIPS", 64)
    path = tmp_path / "metric.safetensors"
    arguments = ["train", "--out", str(path), "--steps", "2", "--clips", "64"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    net, card = toytable_metrics.train_metric_net(steps=2, clips=64)
    read = metric_net(path)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, read.state_dict()[name]), name
    assert metric_card(path) == card
    failed = CliRunner().invoke(app, [*arguments[:-1], "8"])
    assert failed.exit_code == 2
    failed = CliRunner().invoke(app, [*arguments, "--seed", str(HELD_OUT_SEED)])
    assert isinstance(failed.exception, ConfigError)
