"""What a unified model is taught: causality by gradients, and each draw of a step. Letters as in
`training.losses`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from canvasmar_rt.config import ModelConfig, SamplingConfig
from canvasmar_rt.errors import ConfigError
from canvasmar_rt.models import sampler
from canvasmar_rt.models.families import build
from canvasmar_rt.models.unified import UnifiedMAR
from canvasmar_rt.schedule import set_sizes
from tests.conftest import unified_config
from training.config import ModelTraining, Teacher
from training.losses import Draws, UnifiedLoss, model_loss, rotations, zero_outputs

CPU = torch.device("cpu")
B, T, N, C, D, A, F = 2, 6, 16, 4, 32, 4, 3
NEVER: dict[str, Any] = {"temporal_drop": 0.0, "both_drop": 0.0, "action_drop": 0.0}
SILENT = unified_config(action_dim=0)
TEACHERS: tuple[Teacher, ...] = get_args(Teacher)


def training(**changes: Any) -> ModelTraining:
    return ModelTraining(**{"steps": 1, "batch": 1, **changes})


def unified_loss(config: ModelConfig | None = None, **changes: Any) -> UnifiedLoss:
    loss = model_loss(build(config or unified_config(), seed=1), training(**changes))
    assert isinstance(loss, UnifiedLoss)
    return loss


def draws(step: int = 0) -> Draws:
    return Draws(CPU, seed=5, step=step, batch=B)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LATENTS, ACTIONS = normal(B, T, N, C), normal(B, T - 1, A, seed=1)


class Calls:
    """What a method is called with, and what it gives; or, in its place, what `instead` gives."""

    def __init__(
        self, owner: nn.Module | Draws, name: str, instead: Callable[..., Any] | None = None
    ):
        self.inputs: tuple[Any, ...] = ()
        self.output: Any = None
        self._call = instead or getattr(owner, name)
        setattr(owner, name, self)

    def __call__(self, *inputs: Any) -> Any:
        self.inputs, self.output = inputs, self._call(*inputs)
        return self.output


def felt(value: Tensor, source: Tensor) -> Tensor:
    """Whether the frames of `source` (B, T, N, .) tell on `value`: (T,); rows are alike."""
    weight = normal(*value.shape, seed=8)
    (grad,) = torch.autograd.grad(
        (value * weight).sum(), source, retain_graph=True, materialize_grads=True
    )
    told = (grad != 0).any(-1)  # (B, T, N)
    assert torch.equal(told, told[:1, :, :1].expand_as(told))  # each clip, whole frames
    return told[0, :, 0]


# -- what a masked frame sees


@pytest.mark.parametrize(("layers", "window"), [(1, 2), (2, 1), (2, F), (3, 2), (2, 2 * T)])
def test_a_masked_frame_sees_clean_frames_before_it_within_the_window(
    layers: int, window: int
) -> None:
    """History k holds frame k-1. One layer sees `window` frames, each further one as many less
    one; never the masked copy of another frame."""
    config = unified_config(temporal_layers=layers, context_frames=window)
    model = unified_loss(config).temporal
    history = normal(B, T, N, D).requires_grad_()
    drawn = normal(B, T, N, D, seed=1).requires_grad_()
    times = rotations(config, range(T + 1), CPU)
    off = 3
    on = (torch.arange(T) != off).float().expand(B, -1)
    z = model.teach(history, drawn, times, torch.arange(T), on)
    k = torch.arange(T)
    for i in range(T):
        seen = (k <= i) & (k >= i - layers * (window - 1))
        assert torch.equal(felt(z[:, i], history), seen & (i != off))
        assert torch.equal(felt(z[:, i], drawn), k == i)


def test_the_clean_frames_see_no_masked_one() -> None:
    """Their queries, keys and values in every layer have no gradient of what is drawn, and of
    later clean frames neither."""
    model = unified_loss(unified_config(temporal_layers=3)).temporal
    history = normal(B, T, N, D).requires_grad_()
    drawn = normal(B, 1, N, D, seed=1).requires_grad_()  # told apart by their length
    given: dict[int, list[Tensor]] = {T * N: [], N: []}
    for block in model.blocks:
        qkv = block.get_submodule("attn.qkv")
        qkv.register_forward_hook(lambda _, __, out: given[out.shape[1]].append(out))
    times = rotations(model.config, range(T + 1), CPU)
    model.teach(history, drawn, times, torch.tensor([T - 1]), torch.ones(B, 1))
    assert [len(x) for x in given.values()] == [3, 3]
    for layer, (clean, masked) in enumerate(zip(*given.values(), strict=True)):
        assert not felt(clean, drawn).any()
        assert felt(masked, drawn).all()
        assert felt(masked, history).any() == (layer > 0)
        for i, frame in enumerate(clean.view(B, T, N, -1).unbind(1)):
            k = torch.arange(T)
            assert torch.equal(felt(frame, history), (k <= i) & (k >= i - layer * (F - 1)))


@pytest.mark.parametrize("teacher", TEACHERS)
def test_nothing_sees_what_it_predicts(teacher: Teacher) -> None:
    """By gradients of the whole loss: z of a frame changes with its known tokens, and, unless
    its history was dropped, with frames before: with all their tokens, or in `mtf` with known
    ones. Nothing else."""
    config = dataclasses.replace(SILENT, context_frames=T)
    loss = unified_loss(config, teacher=teacher, temporal_drop=0.4)
    teach, draw = Calls(loss.temporal, "teach"), Calls(loss.temporal, "draw_tokens")
    met = set()
    for step in (3, 5, 7):
        latents = LATENTS.clone().requires_grad_()
        loss(latents, None, draws(step))
        frames, on, index = teach.inputs[3].tolist(), teach.inputs[4], draw.inputs[2]
        assert 0 < index.shape[1] < N
        assert max(frames) > 0
        known = torch.zeros(B * len(frames), N, dtype=torch.bool).scatter(1, index, True)
        known = known.view(B, len(frames), N)
        for m, i in enumerate(frames):
            value = (teach.output[:, m] * normal(N, D, seed=8)).sum()
            (grad,) = torch.autograd.grad(value, latents, retain_graph=True)
            told = grad.abs().amax(-1) > 1e-6 * grad.abs().max()  # masks replace by a difference
            assert torch.equal(told[:, i], known[:, m])
            assert not told[:, i + 1 :].any()
            before = known[:, :i] if teacher == "mtf" else torch.ones(B, i, N, dtype=torch.bool)
            assert torch.equal(told[:, :i], before & (on[:, m] > 0)[:, None, None])
            met |= set(on[:, m].tolist())
    assert met == {0.0, 1.0}


@pytest.mark.parametrize(("teacher", "leaks"), [("ctf", True), ("mtf", False)])
def test_a_hidden_token_tells_later_frames_only_by_its_clean_copy(
    teacher: Teacher, leaks: bool
) -> None:
    loss = unified_loss(SILENT, teacher=teacher, **NEVER)
    nn.init.normal_(loss.temporal.embed.bias)  # as after some training
    teach, draw = Calls(loss.temporal, "teach"), Calls(loss.temporal, "draw_tokens")
    j = 2

    def z(latents: Tensor) -> Any:
        with torch.no_grad():
            loss(latents, None, draws(3))
        return teach.output

    before, known = z(LATENTS), draw.inputs[2].view(B, T, -1)
    hidden = next(n for n in range(N) if n not in known[0, j])
    if not leaks:  # its place is taken by the mask
        torch.testing.assert_close(teach.inputs[0][0, j + 1, hidden], loss.temporal.mask)
    changed = LATENTS.index_put((torch.tensor(0), torch.tensor(j), torch.tensor(hidden)), normal(C))
    difference = (z(changed) - before).abs().amax((2, 3))
    assert not difference[1].any()
    assert not difference[0, : j + 1].any()
    later = difference[0, j + 1 :]
    assert later.min() > 1e-5 if leaks else later.max() < 1e-6


@pytest.mark.parametrize("teacher", TEACHERS)
def test_history_is_dropped_alone_and_with_what_has_no_canvas_to_drop(teacher: Teacher) -> None:
    """A unified model has no canvas: both dropped is its history dropped."""
    loss = unified_loss(SILENT, teacher=teacher, temporal_drop=0.1, both_drop=0.2, canvas_drop=0.4)

    def nothing(history: Tensor, drawn: Tensor, *others: Any) -> Tensor:
        return torch.zeros_like(drawn)

    teach = Calls(loss.temporal, "teach", nothing)
    kept = []
    for step in range(300):
        with torch.no_grad():
            loss(LATENTS[:, :2], None, draws(step))
        kept += teach.inputs[4].flatten().tolist()
    assert set(kept) == {0.0, 1.0}
    chance = stats.binomtest(kept.count(0.0), len(kept), 0.3)
    assert chance.pvalue > 1e-3


# -- what is taught


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize(("intervals", "residual"), [(1, False), (1, True), (4, True)])
def test_the_true_velocity_has_no_loss(teacher: Teacher, intervals: int, residual: bool) -> None:
    """Each z meets the target of its own clip, frame and position, also where a step keeps every
    s-th frame, s frames apart in time; of a residual model, what changed since the last kept."""
    config = unified_config(action_dim=0 if intervals > 1 else A, residual=residual)
    loss = unified_loss(config, teacher=teacher, frame_intervals=intervals)
    kept, met = torch.zeros(()), set()

    def positions(history: Tensor, drawn: Tensor, times: Tensor, frames: Tensor, _: Any) -> Tensor:
        nonlocal kept
        length = history.shape[1]
        (s,) = (
            s
            for s in range(1, intervals + 1)
            if torch.equal(times, rotations(config, range(0, s * length + 1, s), CPU))
        )
        met.add(s)
        kept = LATENTS[:, ::s]
        assert teacher == "next-frame" or length == kept.shape[1]
        kept = kept[:, :length]
        return torch.arange(B * length * N).view(B, length, N, 1)[:, frames]

    def velocity(x: Tensor, time: Tensor, z: Tensor) -> Tensor:
        before = torch.cat([torch.zeros_like(kept[:, :1]), kept[:, :-1]], dim=1)
        target = (kept - before if residual else kept).flatten(0, 2)[z[..., 0]]
        return target - (x - time * target) / (1 - time)

    embed = Calls(loss.temporal, "embed_frames")
    Calls(loss.temporal, "teach", positions)
    Calls(loss.flow, "embed_time", lambda time: time[:, None])
    Calls(loss.flow, "embed_condition", lambda z: z)
    Calls(loss.flow, "velocity", velocity)
    for step in range(20):
        with torch.no_grad():
            total, terms = loss(LATENTS, ACTIONS, draws(step))
        assert total == terms["mar"] < 1e-6
        told = embed.inputs[0][:, 1:]
        hidden = (told == 0).all(-1, keepdim=True) if teacher == "mtf" else torch.tensor(False)
        assert torch.where(hidden, True, told == kept[:, :-1]).all()
    assert met == set(range(1, intervals + 1))


def test_only_the_last_frame_of_clips_of_every_length() -> None:
    loss = unified_loss(teacher="next-frame")
    embed = Calls(loss.temporal, "embed_frames")
    teach = Calls(loss.temporal, "teach", lambda _, drawn, *__: drawn)
    count = dict.fromkeys(range(1, T + 1), 0)
    for step in range(150):
        with torch.no_grad():
            loss(LATENTS, ACTIONS, draws(step))
        history, drawn, times, frames, on = teach.inputs
        length = history.shape[1]
        assert torch.equal(embed.inputs[0][:, 1:], LATENTS[:, : length - 1])
        assert torch.equal(embed.inputs[2][:, 1:], ACTIONS[:, : length - 1])
        assert frames.tolist() == [length - 1]
        assert (len(times), on.shape, drawn.shape[1]) == (length + 1, (B, 1), 1)
        count[length] += 1
    assert stats.chisquare(list(count.values())).pvalue > 1e-3


@pytest.mark.parametrize("teacher", ["ctf", "next-frame"])
def test_clips_get_longer_stage_by_stage(teacher: Teacher) -> None:
    """Each length for its share of the steps, the last to the end and beyond; none is longer than
    the clip. Of next-frame clips it is the longest."""
    with pytest.raises(ConfigError, match="shares of the steps"):
        ModelTraining(steps=9, batch=2, lengths=(2, 4), minutes=1.0)
    loss = unified_loss(teacher=teacher, lengths=(2, 4, 99), steps=90)
    teach = Calls(loss.temporal, "teach", lambda _, drawn, *__: drawn)
    found = []
    for step in range(100):
        with torch.no_grad():
            loss(LATENTS, ACTIONS, draws(step))
        found.append(teach.inputs[0].shape[1])
    stages = [set(found[start:end]) for start, end in ((0, 30), (30, 60), (60, None))]
    first = 1 if teacher == "next-frame" else T
    assert stages == [set(range(min(first, n), n + 1)) for n in (2, 4, T)]


def test_intervals_need_a_model_without_actions() -> None:
    with pytest.raises(ConfigError, match="frame_intervals"):
        unified_loss(frame_intervals=2)


def test_history_noise_reaches_the_clean_copies_only() -> None:
    """Each frame has its level, and known tokens of masked frames stay exact."""
    loss = unified_loss(history_noise=0.5)
    embed, draw = Calls(loss.temporal, "embed_frames"), Calls(loss.temporal, "draw_tokens")
    with torch.no_grad():
        loss(LATENTS, ACTIONS, draws(3))
    added = embed.inputs[0][:, 1:] - LATENTS[:, :-1]
    levels = added.square().mean((2, 3), keepdim=True).sqrt()
    assert 0 < levels.min() < 0.2 < levels.max() < 0.6
    assert (levels.amax(1) / levels.amin(1)).min() > 2
    assert stats.kstest((added / levels).flatten(), "norm").pvalue > 1e-3
    _, tokens, index = draw.inputs
    assert index.shape[1] > 0
    assert torch.equal(tokens, LATENTS.flatten(0, 1)[torch.arange(B * T)[:, None], index])


# -- the loss as a whole


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("drop", [0.0, 0.5, 1.0])
def test_every_weight_learns(teacher: Teacher, drop: float) -> None:
    """All have a gradient at every step, as data-parallel training needs; without history what
    only it has stays as it is."""
    loss = unified_loss(teacher=teacher, **NEVER | {"temporal_drop": drop}, canvas_drop=0.0)
    learnt = set()
    for step in range(6):
        loss.zero_grad()
        total, _ = loss(LATENTS, ACTIONS, draws(step))
        assert total.isfinite()
        total.backward()
        for name, parameter in loss.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            learnt |= {name} if parameter.grad.any() else set()
    idle = {name for name, _ in loss.named_parameters()} - learnt
    read = {f"temporal.{n}" for n in ("bos", "action.weight", "action.bias", "no_action")}
    assert idle == (read if drop == 1 else set())


@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_step_is_the_mean_of_its_clips_and_repeats(teacher: Teacher) -> None:
    """All draw lengths, intervals and ratios alike; nothing else depends on who is beside."""
    latents = normal(4, T, N, C)
    options: dict[str, Any] = {"frame_intervals": 3, "history_noise": 0.1, "temporal_drop": 0.3}
    loss = unified_loss(SILENT, teacher=teacher, **options)

    def mean(step: int, rows: range = range(4)) -> Any:
        with torch.no_grad():
            drawn = Draws(CPU, seed=5, step=step, batch=4, rows=rows)
            return loss(latents[rows.start : rows.stop], None, drawn)[0]

    for step in range(4):
        whole = mean(step)
        assert torch.equal(mean(step), whole)
        torch.testing.assert_close((mean(step, range(1)) + 3 * mean(step, range(1, 4))) / 4, whole)
    assert mean(0) != mean(1)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = mean(0)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, mean(0), rtol=0.02, atol=0)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_tiny_batch_is_learnt(teacher: Teacher) -> None:
    """Under three draws, over and over."""
    model = build(unified_config(), seed=1)
    zero_outputs(model)
    loss = model_loss(model, training(teacher=teacher, **NEVER))
    optimizer = torch.optim.AdamW(loss.parameters(), lr=3e-3)
    found = []
    for step in range(30):
        optimizer.zero_grad()
        total, _ = loss(LATENTS, ACTIONS, draws(step % 3))
        total.backward()
        optimizer.step()
        found.append(total.item())
    assert sum(found[-3:]) < 0.8 * sum(found[:3])


def test_training_computes_what_sampling_does() -> None:
    """Where a clip's last frame is one the sampler drew, with the tokens of its last step hidden,
    training conditions the flow head on the same z."""
    model = build(unified_config(), seed=4)
    assert isinstance(model, UnifiedMAR)
    sampling = SamplingConfig(ar_steps=3, flow_steps=2, temporal_guidance=1.0)
    noise = sampler.draw_noise(model.config, sampling, seed=3, streams=range(B), frame=T - 1)
    draw, teach = Calls(model.temporal, "draw"), Calls(model.temporal, "teach")
    state = sampler.start(model, LATENTS[:, :-1], ACTIONS[:, :-1])
    _, sample = sampler.step(model, sampling, state, noise, ACTIONS[:, -1])
    hidden = draw.inputs[1].clone()
    count = hidden.shape[1]
    assert count == set_sizes(N, 3)[-1]
    order = normal(B, T, N).abs()
    order[:, -1].scatter_(1, hidden, torch.linspace(-1, -0.5, count).expand(B, -1))
    latents = torch.cat([LATENTS[:, :-1], sample.latent[:, None].clone()], dim=1)
    loss = model_loss(model, training(**NEVER, mask_ratio_min=0.0, mask_ratio_std=1.0))
    below, here = (stats.norm.cdf(x, 1, 1.0) for x in (0.0, count / N - 1e-3))
    given = draws()
    chance = given.uniform
    Calls(given, "uniform", lambda *shape: order if shape == (T, N) else chance(*shape))
    Calls(given, "shared_uniform", lambda *_: (here - below) / (0.5 - below))
    with torch.no_grad():
        loss(latents, ACTIONS, given)
    found = teach.output[:, -1][torch.arange(B)[:, None], hidden]
    torch.testing.assert_close(found, draw.output[0].clone(), atol=2e-5, rtol=1e-4)
