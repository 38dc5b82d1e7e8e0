"""Losses of both stages: every term against its formula, every draw against its distribution.

Letters as in `training.losses`: B clips, T latent frames, N tokens, C channels, D model width.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from canvasmar_rt.config import FlowConfig, ModelConfig, SamplingConfig
from canvasmar_rt.errors import ConfigError
from canvasmar_rt.models import sampler
from canvasmar_rt.models.autoencoder import Autoencoder
from canvasmar_rt.models.canvasmar import CanvasMAR
from canvasmar_rt.models.families import build
from canvasmar_rt.schedule import set_sizes, time_rotation
from tests.conftest import FAMILIES, VARIANTS, small_config
from training import losses
from training.config import AutoencoderTraining, ModelTraining
from training.losses import (
    OWN_FLOW_STEPS,
    AutoencoderLoss,
    CanvasMarLoss,
    Draws,
    mask_ratio,
    open_skips,
    zero_outputs,
)

CPU = torch.device("cpu")
B, T, N, C, D, A = 3, 4, 16, 4, 32, 4
NEVER: dict[str, Any] = {
    "canvas_drop": 0.0, "temporal_drop": 0.0, "both_drop": 0.0, "action_drop": 0.0
}  # fmt: skip


def training(**changes: Any) -> ModelTraining:
    return ModelTraining(**{"steps": 1, "batch": 1, **changes})


def model_loss(config: ModelConfig | None = None, **changes: Any) -> CanvasMarLoss:
    return CanvasMarLoss(build(config or small_config(), seed=1), training(**changes))


def draws(step: int = 0, batch: int = B, rows: range | None = None) -> Draws:
    return Draws(CPU, seed=5, step=step, batch=batch, rows=rows)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Calls:
    """What a module was called with, and what it gave."""

    def __init__(self, module: nn.Module) -> None:
        self.inputs: tuple[Any, ...] = ()
        self.output: Any = None
        module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self.inputs, self.output = inputs, output


@pytest.fixture
def clip() -> tuple[Tensor, Tensor]:
    """Latents (B, T, N, C) and actions (B, T-1, A)."""
    return normal(B, T, N, C), normal(B, T - 1, A, seed=1)


def unclip(x: Tensor) -> Tensor:
    """(B*T, ...) -> (B, T, ...)."""
    return x.unflatten(0, (-1, T))


# Draws


def test_ranks_draw_what_one_draws_for_all() -> None:
    def three(d: Draws) -> list[Tensor]:
        return [d.normal(4, 3), d.uniform(5), d.normal()]

    together = three(draws(batch=3))
    for rows in (range(1), range(1, 3)):
        for a, b in zip(together, three(draws(batch=3, rows=rows)), strict=True):
            assert torch.equal(a[rows.start : rows.stop], b)
    assert not torch.equal(together[0][0], together[0][1])


def test_every_part_of_the_key_counts() -> None:
    base = draws().normal(8)
    assert torch.equal(draws().normal(8), base)
    for other in (
        Draws(CPU, seed=6, step=0, batch=B),
        Draws(CPU, seed=5, step=1, batch=B),
        Draws(CPU, seed=5, step=0, batch=2 * B, rows=range(B, 2 * B)),
    ):
        assert (other.normal(8) != base).all()


def test_draws_have_their_distributions() -> None:
    d = draws()
    assert stats.kstest(d.normal(4000).flatten(), "norm").pvalue > 1e-3
    assert stats.kstest(d.uniform(4000).flatten(), "uniform").pvalue > 1e-3
    shared = [draws(step).shared_uniform() for step in range(500)]
    assert stats.kstest(shared, "uniform").pvalue > 1e-3


def test_the_shared_number_belongs_to_the_step() -> None:
    first = draws(batch=4, rows=range(2))
    first.normal(3)
    second = draws(batch=4, rows=range(2, 4))
    assert first.shared_uniform() == second.shared_uniform()
    assert torch.equal(
        first.uniform(2), [d := draws(batch=4, rows=range(2)), d.normal(3), d.uniform(2)][2]
    )
    assert draws(1).shared_uniform() != draws(2).shared_uniform()


@pytest.mark.parametrize(("low", "std"), [(0.7, 0.25), (0.5, 0.25), (0.9, 1.0)])
def test_mask_ratio_is_the_quantile_function_of_a_cut_normal(low: float, std: float) -> None:
    u = np.linspace(0, 0.9999, 201)
    expected = stats.truncnorm.ppf(u, (low - 1) / std, 0, loc=1, scale=std)
    found = [mask_ratio(float(x), low=low, std=std) for x in u]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_share_of_whole_frames_is_hidden() -> None:
    loss = model_loss(mask_ratio_min=1.0)
    calls = Calls(loss.spatial)
    loss(normal(B, T, N, C), None, draws())
    assert calls.inputs[3] == N
    assert calls.inputs[4] is None
    assert calls.inputs[5] is None


def test_a_share_of_steps_hides_every_token() -> None:
    latents, whole = normal(B, T, N, C), []
    for share in (0.0, 0.3):
        loss = model_loss(mask_all=share, mask_ratio_min=0.6)
        calls = Calls(loss.spatial)
        found = []
        for step in range(80):
            loss(latents, None, draws(step))
            found.append(calls.inputs[3] == N)
        whole.append(np.mean(found))
    assert whole[0] < 0.35  # what the distribution of the ratio gives
    assert whole[1] - whole[0] == pytest.approx(0.3 * (1 - whole[0]), abs=0.12)


def test_each_frame_is_masked_by_itself(clip: tuple[Tensor, Tensor]) -> None:
    loss = model_loss()
    calls = Calls(loss.spatial)
    ratios = []
    for step in range(40):
        loss(*clip, draws(step))
        _, _, hidden, masked, tokens, known = calls.inputs
        ratio = mask_ratio(draws(step).shared_uniform(), low=0.7, std=0.25)
        assert masked == hidden.shape[1] == int(np.ceil(ratio * N))
        whole = torch.cat([hidden] if known is None else [hidden, known], dim=1)
        assert torch.equal(whole.sort(dim=1).values, torch.arange(N).expand(B * T, N))
        assert len({tuple(row) for row in hidden.sort(dim=1).values.tolist()}) > 1 or masked == N
        if known is not None:
            frames = clip[0].flatten(0, 1)
            assert torch.equal(tokens, frames[torch.arange(B * T)[:, None], known])
        ratios.append(masked)
    assert min(ratios) <= 13
    assert max(ratios) == N


# CanvasMAR


def test_total_is_the_weighted_sum(clip: tuple[Tensor, Tensor]) -> None:
    total, terms = model_loss()(*clip, draws())
    assert set(terms) == {"mar", "canvas", "static"}
    expected = terms["mar"] + 0.1 * terms["canvas"] + 0.1 * terms["static"]
    torch.testing.assert_close(total, expected)
    total, terms = model_loss(canvas_weight=3.0, static_weight=0.0)(*clip, draws())
    torch.testing.assert_close(total, terms["mar"] + 3 * terms["canvas"])
    total, terms = model_loss(mar_weight=2.0)(*clip, draws())
    torch.testing.assert_close(total - expected, terms["mar"])


def test_without_l_mar_the_canvas_learns_alone(clip: tuple[Tensor, Tensor]) -> None:
    whole, loss = model_loss(), model_loss(mar_weight=0.0)
    _, wanted = whole(*clip, draws())
    total, terms = loss(*clip, draws())
    assert set(terms) == {"canvas", "static"}
    for name, value in terms.items():
        assert torch.equal(value, wanted[name])
    torch.testing.assert_close(total, 0.1 * terms["canvas"] + 0.1 * terms["static"])
    total.backward()
    learning = {name.split(".")[0] for name, p in loss.named_parameters() if p.grad is not None}
    assert learning == {"temporal", "canvas"}
    assert not any(p.requires_grad for p in (*loss.spatial.parameters(), *loss.flow.parameters()))


def test_without_l_mar_and_canvas_nothing_would_learn() -> None:
    for model in (VARIANTS["no-canvas"], FAMILIES["unified"]):
        with pytest.raises(ConfigError, match="mar_weight"):
            losses.model_loss(build(model), training(mar_weight=0.0))


def test_canvas_and_staticness_are_their_equations(clip: tuple[Tensor, Tensor]) -> None:
    loss = model_loss()
    calls = Calls(loss.canvas)  # type: ignore[arg-type]
    _, terms = loss(*clip, draws())
    _, canvas, staticness = (unclip(x).detach().double().numpy() for x in calls.output)
    frames = clip[0].double().numpy()
    errors, misses = [], []
    for b in range(B):
        for i in range(1, T):  # the first frame has none before it
            for j in range(N):
                error = float(((canvas[b, i, j] - frames[b, i, j]) ** 2).sum())  # eq. 6
                errors.append(error)
                misses.append((staticness[b, i, j] - np.exp(-error)) ** 2)
    np.testing.assert_allclose(terms["canvas"].item(), np.mean(errors) / C, rtol=1e-5)
    np.testing.assert_allclose(terms["static"].item(), np.mean(misses), rtol=1e-5)


def test_staticness_does_not_teach_the_canvas(clip: tuple[Tensor, Tensor]) -> None:
    loss = model_loss()
    assert loss.canvas is not None
    _, terms = loss(*clip, draws())
    head = loss.canvas.canvas.weight
    (none,) = torch.autograd.grad(terms["static"], head, retain_graph=True, allow_unused=True)
    assert none is None
    assert torch.autograd.grad(terms["canvas"], head)[0].abs().min() > 0


def mixing(a: Tensor, b: Tensor, known_a: Tensor, known_b: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficient and noise of x*(1-r) + noise*r, (rows,) and like a, from what two values of x
    (rows, ...) became under the same draws."""
    share = ((a - b) / (known_a - known_b)).flatten(1)
    r = 1 - share.median(dim=1).values
    torch.testing.assert_close(share, (1 - r)[:, None].expand_as(share), atol=2e-3, rtol=0)
    shape = (-1, *[1] * (a.ndim - 1))
    return r, (a - known_a * (1 - r).reshape(shape)) / r.reshape(shape)


def test_the_frame_before_is_noised_by_eq_11(clip: tuple[Tensor, Tensor]) -> None:
    loss = model_loss()
    calls = Calls(loss.canvas)  # type: ignore[arg-type]
    seen, ratios, noises = [], [], []
    frames = clip[0], clip[0] + 1 + normal(B, T, N, C, seed=3).abs()
    for step in range(12):
        seen.clear()
        for latents in frames:
            loss(latents, clip[1], draws(step))
            seen.append(unclip(calls.inputs[1])[:, 1:].flatten(0, 1))
        before = [x[:, :-1].flatten(0, 1) for x in frames]
        r, noise = mixing(seen[0], seen[1], before[0], before[1])
        ratios.append(r)
        noises.append(noise)
    uniform = (torch.cat(ratios) - 0.2) / 0.4
    assert uniform.min() > 0
    assert uniform.max() < 1
    assert stats.kstest(uniform, "uniform").pvalue > 1e-3  # each frame draws its own
    assert stats.kstest(torch.cat(noises).flatten(), "norm").pvalue > 1e-3


def test_canvas_tokens_are_noised_by_eq_12(clip: tuple[Tensor, Tensor]) -> None:
    loss = model_loss(**NEVER)
    assert loss.canvas is not None
    calls = Calls(loss.spatial)
    token = torch.zeros(())

    def replace(module: nn.Module, inputs: Any, output: Any) -> Any:
        return token.expand_as(output[0]), *output[1:]

    loss.canvas.register_forward_hook(replace)
    ratios, noises = [], []
    for step in range(12):
        seen = []
        for token in (torch.tensor(0.0), torch.tensor(1.0)):  # noqa: B007, the hook reads it
            loss(*clip, draws(step))
            tokens = unclip(calls.inputs[1])
            assert (tokens[:, 0] == loss.spatial.mask).all()
            seen.append(tokens[:, 1:].flatten(0, 1).detach())
        r, noise = mixing(seen[0], seen[1], torch.zeros_like(seen[0]), torch.ones_like(seen[0]))
        ratios.append(r)
        noises.append(noise[r > 0.02])
    uniform = torch.cat(ratios) / 0.3
    assert stats.kstest(uniform, "uniform").pvalue > 1e-3
    assert stats.kstest(torch.cat(noises).flatten(), "norm").pvalue > 1e-3


class TrueVelocity:
    """Stands for the flow head: finds each token's target by its position, which it is given as
    the token's embedding, and the noise by inverting x = (1-u)*noise + u*target."""

    def __init__(self, loss: CanvasMarLoss, latents: Tensor, scale: float = 1.0) -> None:
        if loss.model_config.residual:
            latents = torch.cat([latents[:, :1], latents.diff(dim=1)], dim=1)
        self.tokens, self.scale = latents.flatten(0, 2), scale
        self.times, self.noises = Tensor(), Tensor()
        loss.spatial.register_forward_hook(self._positions)
        for name in ("embed_time", "embed_condition", "velocity"):
            setattr(loss.flow, name, getattr(self, name))

    @staticmethod
    def _positions(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        hidden = inputs[2][:, : output.shape[1]]
        return (torch.arange(len(hidden))[:, None] * N + hidden)[..., None]

    def embed_time(self, time: Tensor) -> Tensor:
        return time[:, None]

    def embed_condition(self, z: Tensor) -> Tensor:
        return z

    def velocity(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        target = self.tokens[condition[..., 0]]
        self.times, self.noises = time[..., 0], (x - time * target) / (1 - time)
        return self.scale * (target - self.noises)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_true_velocity_has_no_loss(name: str, clip: tuple[Tensor, Tensor]) -> None:
    loss = model_loss(VARIANTS[name], flow_repeat=3)
    oracle = TrueVelocity(loss, clip[0])
    with torch.no_grad():
        _, terms = loss(*clip, draws())
    assert terms["mar"] < 1e-6
    assert oracle.times.shape[:2] == (3, B * T)
    assert stats.kstest(oracle.noises.flatten(), "norm").pvalue > 1e-3
    assert oracle.times.unique().numel() == oracle.times.numel()


def test_no_velocity_costs_its_square(clip: tuple[Tensor, Tensor]) -> None:
    loss = model_loss(flow_repeat=32)
    oracle = TrueVelocity(loss, clip[0], scale=0.0)
    with torch.no_grad():
        _, terms = loss(*clip, draws())
    # E (x - noise)^2 = E x^2 + 1, and the latents are standard normal numbers
    assert terms["mar"].item() == pytest.approx(2.0, abs=0.1)
    assert stats.kstest(oracle.times.flatten(), "uniform").pvalue > 1e-3


def test_flow_times_may_be_logit_normal(clip: tuple[Tensor, Tensor]) -> None:
    loss = model_loss(flow_time="logit-normal")
    oracle = TrueVelocity(loss, clip[0])
    with torch.no_grad():
        loss(*clip, draws())
    assert stats.kstest(oracle.times.flatten().logit(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("kind", ["uniform", "logit-normal"])
def test_the_tokens_of_a_frame_may_share_their_flow_times(
    kind: Any, clip: tuple[Tensor, Tensor]
) -> None:
    loss = model_loss(flow_time=kind, flow_time_of="frame", flow_repeat=3)
    oracle = TrueVelocity(loss, clip[0])
    with torch.no_grad():
        _, terms = loss(*clip, draws())
    assert terms["mar"] < 1e-6
    assert oracle.times.shape == (3, B * T, 1)
    assert oracle.times.unique().numel() == oracle.times.numel()
    assert oracle.noises.shape[:2] == (3, B * T)
    assert stats.kstest(oracle.noises.flatten(), "norm").pvalue > 1e-3


def without_spatial(loss: CanvasMarLoss, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the work that does not matter to what goes in."""

    def forward(condition: Any, canvas: Tensor, hidden: Tensor, select: int, *known: Any) -> Tensor:
        return torch.zeros(len(hidden), select, D)

    monkeypatch.setattr(loss.spatial, "forward", forward)


def test_guidance_drops_have_their_chances(monkeypatch: pytest.MonkeyPatch) -> None:
    chances = {"canvas": 0.05, "temporal": 0.1, "both": 0.2}
    drops: dict[str, Any] = {f"{name}_drop": chance for name, chance in chances.items()}
    loss = model_loss(**drops)
    without_spatial(loss, monkeypatch)
    calls = Calls(loss.spatial)
    clips = 64
    latents, count = normal(clips, T, N, C), dict.fromkeys(chances, 0)
    steps = 20
    with torch.no_grad():
        for step in range(steps):
            loss(latents, None, draws(step, clips))
            temporal_off = (calls.inputs[0] == loss.spatial.no_temporal).all(-1)
            canvas_off = (calls.inputs[1] == loss.spatial.mask).all(-1)
            assert (temporal_off == temporal_off[:, :1]).all()  # a frame as a whole
            assert (canvas_off == canvas_off[:, :1]).all()
            assert unclip(canvas_off)[:, 0].all()  # nothing to go on at the start
            no_t, no_c = unclip(temporal_off[:, 0])[:, 1:], unclip(canvas_off[:, 0])[:, 1:]
            count["canvas"] += int((no_c & ~no_t).sum())
            count["temporal"] += int((no_t & ~no_c).sum())
            count["both"] += int((no_t & no_c).sum())
    for name, found in count.items():
        test = stats.binomtest(found, steps * clips * (T - 1), chances[name])
        assert test.pvalue > 1e-3, (name, found)


def test_temporal_reads_the_past(clip: tuple[Tensor, Tensor]) -> None:
    latents, actions = clip
    loss = model_loss(**NEVER)
    calls = Calls(loss.temporal)
    loss(*clip, draws())
    read, first, moved, given, rotation = calls.inputs
    assert torch.equal(read[:, 1:], latents[:, :-1])
    assert not read[:, 0].any()
    assert first.tolist() == [[1, 0, 0, 0]] * B
    assert torch.equal(moved[:, 1:], actions)
    assert given.tolist() == [[0, 1, 1, 1]] * B
    for i in range(T):
        np.testing.assert_array_equal(rotation[i], time_rotation(i, 2))


def test_history_noise_reaches_the_temporal_input_only(clip: tuple[Tensor, Tensor]) -> None:
    loss = model_loss(history_noise=0.5)
    temporal, spatial = Calls(loss.temporal), Calls(loss.spatial)
    frames, seen = (clip[0], clip[0] + 1), []
    for latents in frames:
        loss(latents, clip[1], draws())
        seen.append(temporal.inputs[0][:, 1:].flatten(0, 1))
        known = spatial.inputs[5]
        exact = latents.flatten(0, 1)[torch.arange(B * T)[:, None], known]
        assert torch.equal(spatial.inputs[4], exact)
    before = [x[:, :-1].flatten(0, 1) for x in frames]
    added = seen[0] - before[0]
    # a history that noise shrank would teach the model to amplify what it reads, frame by frame
    torch.testing.assert_close(seen[1] - before[1], added, rtol=0, atol=1e-5)
    levels = added.square().mean((1, 2), keepdim=True).sqrt()
    assert 0 < levels.min() < 0.2
    assert 0.2 < levels.max() < 0.5 * 1.5
    assert stats.kstest((added / levels).flatten(), "norm").pvalue > 1e-3


def test_actions_are_dropped_for_clips_and_for_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = model_loss()
    calls = Calls(loss.temporal)
    without_spatial(loss, monkeypatch)
    monkeypatch.setattr(
        loss.temporal, "forward", lambda read, *_: torch.zeros(*read.shape[:2], 4, D)
    )
    clips, steps = 64, 20
    latents, actions, given = normal(clips, T, N, C), normal(clips, T - 1, A), []
    with torch.no_grad():
        for step in range(steps):
            loss(latents, actions, draws(step, clips))
            assert not calls.inputs[3][:, 0].any()
            given.append(calls.inputs[3][:, 1:])
    told = torch.cat(given)
    assert set(told.unique().tolist()) == {0.0, 1.0}
    whole = int((told.sum(1) == 0).sum())
    assert stats.binomtest(whole, len(told), 0.05 + 0.95 * 0.05**3).pvalue > 1e-3
    steps_dropped = int((told[told.any(1)] == 0).sum())
    among = int(told.any(1).sum()) * (T - 1)
    assert steps_dropped / among == pytest.approx(0.05, abs=0.015)


def test_clips_without_actions_train_the_null_action(clip: tuple[Tensor, Tensor]) -> None:
    loss = model_loss()
    calls = Calls(loss.temporal)
    total, _ = loss(clip[0], None, draws())
    assert not calls.inputs[3].any()
    total.backward()
    assert loss.temporal.no_action.grad is not None
    assert loss.temporal.no_action.grad.any()


def test_without_a_canvas_there_are_mask_embeddings(clip: tuple[Tensor, Tensor]) -> None:
    loss = model_loss(VARIANTS["no-canvas"])
    calls = Calls(loss.spatial)
    total, terms = loss(*clip, draws())
    assert set(terms) == {"mar"}
    assert torch.equal(total, terms["mar"])
    assert torch.equal(calls.inputs[1], loss.spatial.mask.expand(B * T, N, D))


def test_an_isolated_condition_is_read_once(clip: tuple[Tensor, Tensor]) -> None:
    loss = model_loss(VARIANTS["mmdit"], **NEVER)
    temporal, spatial = Calls(loss.temporal), Calls(loss.spatial)
    with torch.no_grad():
        loss(clip[0], None, draws())
        expected = loss.spatial.condition_keys_values(temporal.output.flatten(0, 1))
    assert len(spatial.inputs[0]) == 3
    for found, pair in zip(spatial.inputs[0], expected, strict=True):
        for a, b in zip(found, pair, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_sees_what_it_predicts(name: str, clip: tuple[Tensor, Tensor]) -> None:
    """z of frame i, from which its hidden tokens are drawn, changes with the known tokens of frame
    i and all tokens of frames before (the window permitting), and with nothing else."""
    config = dataclasses.replace(VARIANTS[name], context_frames=T)
    loss = model_loss(config, **NEVER)
    z, canvas = Calls(loss.spatial), None if loss.canvas is None else Calls(loss.canvas)
    latents = clip[0].clone().requires_grad_()
    step = next(
        s for s in range(99) if mask_ratio(draws(s).shared_uniform(), low=0.7, std=0.25) < 0.8
    )
    loss(latents, clip[1] if config.action_dim else None, draws(step))
    hidden = torch.zeros(B * T, N, dtype=torch.bool).scatter_(1, z.inputs[2], True)
    weight = normal(*z.output.shape[1:], seed=8)
    for i in range(T):
        value = (unclip(z.output)[:, i] * weight).sum()
        (grad,) = torch.autograd.grad(value, latents, retain_graph=True)
        felt = grad.abs().sum(-1) > 0  # (B, T, N)
        assert not felt[:, i + 1 :].any()
        assert felt[:, :i].all()
        assert torch.equal(felt[:, i], ~unclip(hidden)[:, i])
        if canvas is not None and i:
            value = (unclip(canvas.output[1])[:, i] * normal(N, C, seed=9)).sum()
            (grad,) = torch.autograd.grad(value, latents, retain_graph=True)
            felt = grad.abs().sum(-1) > 0
            assert felt[:, :i].all()
            assert not felt[:, i:].any()


def test_a_hidden_token_can_be_anything(clip: tuple[Tensor, Tensor]) -> None:
    loss = model_loss(**NEVER)
    calls = Calls(loss.spatial)

    def last_z(latents: Tensor) -> Tensor:
        with torch.no_grad():
            loss(latents, clip[1], draws())
        return unclip(calls.output)[:, -1]

    before = last_z(clip[0])
    hidden, known = (unclip(calls.inputs[i])[0, -1] for i in (2, 5))
    changed = clip[0].clone()
    changed[0, -1, hidden] = 1e6
    assert torch.equal(last_z(changed), before)
    changed = clip[0].clone()
    changed[0, -1, known[0]] += 1
    after = last_z(changed)
    assert not torch.isclose(after[0], before[0]).all(-1).any()
    assert torch.equal(after[1:], before[1:])


def test_a_batch_is_the_mean_of_its_clips() -> None:
    latents, actions = normal(4, T, N, C), normal(4, T - 1, A)
    loss = model_loss()
    whole, terms = loss(latents, actions, draws(batch=4))
    halves = [
        loss(latents[i : i + 2], actions[i : i + 2], draws(batch=4, rows=range(i, i + 2)))
        for i in (0, 2)
    ]
    torch.testing.assert_close(whole, (halves[0][0] + halves[1][0]) / 2)
    for name, value in terms.items():
        torch.testing.assert_close(value, (halves[0][1][name] + halves[1][1][name]) / 2)


@pytest.mark.parametrize("name", VARIANTS)
def test_bf16_is_the_same_loss(name: str, clip: tuple[Tensor, Tensor]) -> None:
    loss = model_loss(VARIANTS[name])
    exact, terms = loss(*clip, draws())
    with torch.autocast("cpu", torch.bfloat16):
        rounded, rough = loss(*clip, draws())
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0)
    for key, value in terms.items():
        torch.testing.assert_close(rough[key], value, rtol=0.05, atol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_weight_learns(name: str, clip: tuple[Tensor, Tensor]) -> None:
    loss = model_loss(VARIANTS[name], canvas_drop=0.2, temporal_drop=0.2, both_drop=0.2)
    step = next(
        s for s in range(99) if mask_ratio(draws(s).shared_uniform(), low=0.7, std=0.25) < 0.9
    )
    loss(*clip, draws(step))[0].backward()
    idle = {n for n, p in loss.named_parameters() if p.grad is None or not p.grad.any()}
    # an expert norm of tokens a layer never sees, and what follows the last layer's attention for
    # tokens whose output nobody reads
    unused = {
        "expert": r"blocks\.0\.norm[12]\.experts\.1|blocks\.2\.norm2\.experts\.[02]",
        "mmdit": r"blocks\.2\.(norm2|out|mlp)\.experts\.1",
        "no-canvas": r"$.",
    }[name]
    assert idle == {n for n, _ in loss.named_parameters() if re.match(rf"spatial\.({unused})\.", n)}


class Given(Draws):
    """Draws that give chosen numbers, told apart by their shape, and the rest by chance."""

    def __init__(self, shared: float, **given: Tensor) -> None:
        super().__init__(CPU, seed=0, step=0, batch=B)
        self.shared, self.given = shared, {tuple(t.shape[1:]): t for t in given.values()}

    def normal(self, *shape: int) -> Tensor:
        return self.given.get(shape, super().normal(*shape))

    def uniform(self, *shape: int) -> Tensor:
        return self.given.get(shape, super().uniform(*shape))

    def shared_uniform(self, what: str = "") -> float:
        return self.shared


@pytest.mark.parametrize("name", VARIANTS)
def test_training_computes_what_sampling_does(name: str, clip: tuple[Tensor, Tensor]) -> None:
    """Where a clip's last frame is one the sampler drew, with the sampler's noise and the tokens
    of its last step hidden, training conditions the flow head on the same z."""
    config = dataclasses.replace(VARIANTS[name], dim=48)  # so that shapes tell noises apart
    config = dataclasses.replace(config, context_frames=T)
    model = build(config, seed=4)
    actions = clip[1] if config.action_dim else None
    sampling = SamplingConfig(
        ar_steps=3, flow_steps=2, temporal_guidance=1.0, canvas_guidance=1.0,
        frame_noise=0.35, canvas_noise=0.15,
    )  # fmt: skip
    spatial = Calls(model.spatial)
    noise = sampler.draw_noise(config, sampling, seed=3, streams=range(B), frame=T - 1)
    state = sampler.start(model, clip[0][:, :-1], None if actions is None else actions[:, :-1])
    last = None if actions is None else actions[:, -1]
    _, sample = sampler.step(model, sampling, state, noise, last)
    expected, hidden = spatial.output.clone(), spatial.inputs[2].clone()
    assert hidden.shape[1] == set_sizes(N, 3)[-1]

    latents = torch.cat([clip[0][:, :-1], sample.latent[:, None].clone()], dim=1)
    order = torch.rand(B, T, N)
    order[:, -1].scatter_(
        1, hidden.clone(), torch.linspace(-1, -0.5, hidden.shape[1]).expand(B, -1)
    )
    frame_noise, canvas_noise = torch.zeros(B, T, N, C), torch.zeros(B, T, N, 48)
    frame_noise[:, -1], canvas_noise[:, -1] = noise.frame, noise.canvas
    loss = CanvasMarLoss(
        model,
        training(
            **NEVER, frame_noise=(0.35, 0.35), canvas_noise=(0.15, 0.15), mask_ratio_min=0.0,
            mask_ratio_std=1.0,
        ),
    )  # fmt: skip
    wanted = hidden.shape[1] / N
    below, here = (stats.norm.cdf(x, 1, 1.0) for x in (0.0, wanted - 1e-3))
    shared = (here - below) / (0.5 - below)
    given = Given(shared, order=order, frame=frame_noise, canvas=canvas_noise)
    with torch.no_grad():
        loss(latents, actions, given)
    assert torch.equal(unclip(spatial.inputs[2])[:, -1], hidden)
    torch.testing.assert_close(unclip(spatial.output)[:, -1], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_own_history_is_what_the_sampler_draws(name: str, clip: tuple[Tensor, Tensor]) -> None:
    """A pass puts in the place of every frame but the first what one AR step draws after the
    frames before it, whatever is dropped from what is learnt."""
    config = dataclasses.replace(VARIANTS[name], dim=48, context_frames=T)
    model, latents = build(config, seed=4), clip[0]
    actions = clip[1] if config.action_dim else None
    sampling = SamplingConfig(
        ar_steps=1, flow_steps=OWN_FLOW_STEPS, temporal_guidance=1.0, canvas_guidance=1.0,
        frame_noise=0.35, canvas_noise=0.15,
    )  # fmt: skip
    noises, expected = [], [latents[:, 0]]
    for i in range(T):
        noise = sampler.draw_noise(config, sampling, seed=3, streams=range(B), frame=i)
        noises.append(dataclasses.replace(noise, flow=noise.frame))  # one shape, one draw
    for i in range(1, T):
        before, last = (None, None) if actions is None else (actions[:, : i - 1], actions[:, i - 1])
        state = sampler.start(model, latents[:, :i], before)
        expected.append(sampler.step(model, sampling, state, noises[i], last)[1].latent)
    options = training(
        action_drop=1.0, history_noise=0.5, frame_noise=(0.35, 0.35),
        canvas_noise=(0.15, 0.15),
    )  # fmt: skip
    loss, temporal = CanvasMarLoss(model, options), Calls(model.temporal)
    given = Given(
        0.99,
        frame=torch.stack([n.frame for n in noises], dim=1),
        canvas=torch.stack([n.canvas for n in noises], dim=1),
    )
    history = loss.predicted(latents, actions, given)
    torch.testing.assert_close(history, torch.stack(expected, dim=1), atol=2e-5, rtol=1e-4)
    loss.config = dataclasses.replace(options, history_noise=0.0)
    loss(latents, actions, given, history)
    assert torch.equal(temporal.inputs[0][:, 1:], history[:, :-1])


@pytest.mark.parametrize("group", [1, 2])
def test_a_residual_model_learns_what_changes(
    group: int, clip: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its canvas and its tokens are differences from the frame before the group, which the loss
    adds to the canvas and takes from the tokens; before the first frame there is none."""
    config = small_config(residual=True, group=group, spatial_layers=6, action_dim=0)
    taught = []
    monkeypatch.setattr(losses, "flow_loss", lambda *args: taught.append(args[2]) or args[1].sum())
    loss = model_loss(config, mask_ratio_min=1.0, history_noise=0.5)
    assert loss.canvas is not None
    nn.init.zeros_(loss.canvas.canvas.weight)
    nn.init.zeros_(loss.canvas.canvas.bias)
    spatial = Calls(loss.spatial)
    step = next(s for s in range(9) if int(draws(s).shared_uniform() * group) == 0)
    _, terms = loss(clip[0], None, draws(step))
    groups = clip[0].unflatten(1, (-1, group))  # (B, M, J, N, C)
    before = torch.cat([torch.zeros(B, 1, 1, N, C), groups[:, :-1, -1:]], dim=1)
    changes = (groups - before).flatten(0, 2)
    hidden = spatial.inputs[2]
    assert torch.equal(taught[0], changes[torch.arange(len(changes))[:, None], hidden])
    expected = (groups - before)[:, 1:].square().mean()
    torch.testing.assert_close(terms["canvas"], expected)


@pytest.mark.parametrize("modulation", ["joint", "additive"])
def test_the_flow_head_starts_at_rest(modulation: Any) -> None:
    model = build(small_config(flow=FlowConfig(width=32, blocks=2, modulation=modulation)))
    zero_outputs(model)
    flow = model.flow
    velocity = flow.velocity(
        normal(5, C), flow.embed_time(torch.rand(5)), flow.embed_condition(normal(5, D))
    )
    assert not velocity.any()
    velocity.sum().backward()
    assert flow.out.weight.grad is not None
    assert flow.out.weight.grad.any()


# Autoencoder


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    model: CanvasMAR = build(small_config(), seed=2)
    return model.autoencoder


@pytest.mark.parametrize("weights", [(1e-6, 1.0), (0.5, 0.0), (0.0, 2.0)])
def test_autoencoder_terms_are_their_formulas(
    autoencoder: Autoencoder, weights: tuple[float, float]
) -> None:
    config = AutoencoderTraining(steps=1, batch=2, kl_weight=weights[0], gradient_weight=weights[1])
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (2, 5, 16, 16, 3), generator=generator, dtype=torch.uint8)
    encoder, decoder = Calls(autoencoder.encoder), Calls(autoencoder.decoder)
    total, terms = AutoencoderLoss(autoencoder, config)(frames, draws(batch=2))

    grouped = frames[:, [0, 0, 1, 2, 3, 4]].double() / 127.5 - 1  # the first frame stands alone
    torch.testing.assert_close(encoder.inputs[0].double(), grouped, atol=1e-6, rtol=0)
    mean, logvar = encoder.output[:2]
    noise = draws(batch=2).normal(*mean.shape[1:])
    torch.testing.assert_close(decoder.inputs[0], mean + torch.exp(logvar / 2) * noise)
    posterior = torch.distributions.Normal(mean, torch.exp(logvar / 2))
    prior = torch.distributions.Normal(0.0, 1.0)
    kl = torch.distributions.kl_divergence(posterior, prior).sum((2, 3, 4)).mean()  # of a frame
    torch.testing.assert_close(terms["kl"], kl)

    output, target = decoder.output[0].detach().double().numpy(), grouped.numpy()
    error = output - target
    np.testing.assert_allclose(terms["l1"].item(), np.abs(error).mean(), rtol=1e-5)
    down, right = error[:, :, 1:] - error[:, :, :-1], error[..., 1:, :] - error[..., :-1, :]
    gradient = (np.abs(down).mean() + np.abs(right).mean()) / 2
    np.testing.assert_allclose(terms["gradient"].item(), gradient, rtol=1e-5)
    eight_bits = (np.clip(output, -1, 1) - target) * 127.5
    psnr = 10 * np.log10(255**2 / (eight_bits**2).mean())
    np.testing.assert_allclose(terms["psnr"].item(), psnr, rtol=1e-5)
    expected = terms["l1"] + weights[1] * terms["gradient"] + weights[0] * terms["kl"]
    torch.testing.assert_close(total, expected)


def test_an_autoencoder_starts_linear() -> None:
    model = build(small_config(), seed=2).autoencoder
    open_skips(model)
    loss = AutoencoderLoss(model, AutoencoderTraining(steps=1, batch=2))
    calls = Calls(model.encoder)
    means = []
    with torch.no_grad():
        for values in (40, 90, 130):  # 130 = 40 + 90
            frames = torch.full((1, 3, 16, 16, 3), values, dtype=torch.uint8)
            loss(frames, draws(batch=1))
            means.append(calls.output[0])
    # affine: with grey at -1 + x/127.5, f(40) - f(90) scales as the difference of the inputs
    slope, other = (means[1] - means[0]) / 50, (means[2] - means[1]) / 40
    torch.testing.assert_close(slope, other, atol=1e-6, rtol=1e-3)


def test_additive_gates_are_closed_at_every_time() -> None:
    model = build(small_config(flow=FlowConfig(width=32, blocks=2, modulation="additive")))
    assert model.flow.embed_time(torch.tensor([0.3])).any()
    zero_outputs(model)
    assert not model.flow.embed_time(torch.tensor([0.3])).any()
