"""Next-group prediction (App. B) as modules and as training: J latent frames drawn in one step.

Letters as in `canvasmar_rt.config`; M groups of a clip, R rows: row r is frame r % J of its group.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from canvasmar_rt.config import ModelConfig, SamplingConfig, from_dict, to_dict
from canvasmar_rt.errors import ConfigError, InputError
from canvasmar_rt.models import sampler
from canvasmar_rt.models.canvasmar import CanvasViT, GroupAttention, SpatialMAR
from canvasmar_rt.models.families import build
from tests.conftest import FAMILIES, SAMPLING, small_config, unified_config
from tests.models import test_spatial
from tests.models.test_spatial import N, config, every_kind, make, random
from tests.training.small_runs import Waves
from tests.training.test_losses import NEVER, Calls, Given, draws, training
from training import losses
from training.clips import Clips, latent_actions
from training.losses import CanvasMarLoss, told_history
from training.stages import ModelStage, continue_clips, group_actions
from training.transfer import transfer

B, T, J = 3, 8, 3
GROUPS = ("next-group", "next-group-isolated")


def grouped(**changes: Any) -> ModelConfig:
    return small_config("grouped", **{"group": J, "spatial_layers": 6, "action_dim": 6} | changes)


# -- the modules


def test_frames_of_a_group_meet_at_one_position_and_nowhere_else() -> None:
    """Whatever the order of the tokens; the values are those of attention, position by position."""
    torch.manual_seed(0)
    layer, tokens, rows = GroupAttention(grouped()), 6, 2 * J
    x = torch.randn(rows, tokens, 32, requires_grad=True)
    index = torch.stack([torch.randperm(tokens) for _ in range(rows)])
    out = layer(x, index)
    weight, group = torch.randn(32), torch.arange(rows)[:, None] // J
    for row in range(rows):
        for i in range(tokens):
            (grad,) = torch.autograd.grad((out[row, i] * weight).sum(), x, retain_graph=True)
            meets = (index == index[row, i]) & (group == row // J)
            assert torch.equal(grad.abs().sum(-1) > 0, meets)
            at = x[meets]  # (J, D), the frames in their order
            q, k, v = (
                y.unflatten(-1, (2, -1)).transpose(0, 1)
                for y in layer.attn.qkv(layer.norm(at)).chunk(3, -1)
            )
            seen = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
            want = at + layer.attn.out(seen.transpose(0, 1).flatten(1))
            torch.testing.assert_close(out[row, i], want[row % J], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layers", "encoder", "expected"),
    [
        (5, 1, (3,)), (6, 3, (3,)), (8, 2, (3,)), (9, 4, (7,)),
        (16, 3, (3, 7, 11)), (16, 4, (7, 11)), (20, 8, (11, 15)),
    ],
)  # fmt: skip
def test_frames_meet_after_every_fourth_layer_of_whole_frames_but_the_last(
    layers: int, encoder: int, expected: tuple[int, ...]
) -> None:
    sizes = {"spatial_layers": layers, "encoder_layers": encoder}
    assert grouped(**sizes).group_layers == expected
    assert list(build(grouped(**sizes)).spatial.group) == [str(layer) for layer in expected]
    assert grouped(group=1, **sizes).group_layers == ()


@pytest.mark.parametrize(("layers", "encoder"), [(4, 1), (6, 4)])
def test_frames_that_would_never_meet_are_refused(layers: int, encoder: int) -> None:
    with pytest.raises(ConfigError, match=rf"meet after .* {layers} layers with .* {encoder}"):
        grouped(spatial_layers=layers, encoder_layers=encoder)


KNOWN, SELECT = 7, 6


def example(rows: int) -> tuple[Tensor, ...]:
    """That of `test_spatial`, the frames of a group sharing a condition."""
    condition, *others = test_spatial.example(rows=rows)
    return condition[::J].repeat_interleave(J, 0), *others


def run(spatial: SpatialMAR, condition: Tensor, *others: Any) -> Tensor:
    return test_spatial.run(spatial, condition[::J], *others)


@every_kind
@torch.inference_mode()
def test_only_frames_of_one_group_see_each_other(norm: str, attend: str) -> None:
    """What is drawn of a frame, and what is known of it, matters to every frame of its group and to
    no other; without a layer where they meet, to itself alone."""
    for meet in (True, False):
        spatial = make(norm, attend, group=J, spatial_layers=6).spatial
        if not meet:
            for layer in spatial.group.values():
                layer.attn.out.weight.zero_()
        args = condition, canvas, latent, positions = example(rows=2 * J)
        before = run(spatial, *args, KNOWN, SELECT)
        for rows in (slice(0, J), slice(J, 2 * J)):
            alone = run(spatial, *(x[rows] for x in args), KNOWN, SELECT)
            torch.testing.assert_close(alone, before[rows], rtol=1e-4, atol=1e-5)
        for what, token in ((canvas, KNOWN), (latent, 0)):
            changed = what.clone()
            changed[1, positions[1, token]] *= -1
            other = (condition, changed, latent) if what is canvas else (condition, canvas, changed)
            after = run(spatial, *other, positions, KNOWN, SELECT)
            felt = (after - before).abs().amax((1, 2))
            assert (felt > 1e-4).tolist() == [r < J if meet else r == 1 for r in range(6)]
            assert not felt[J:].any()


@every_kind
@torch.inference_mode()
def test_neither_selection_nor_order_matters_to_a_group(norm: str, attend: str) -> None:
    spatial = make(norm, attend, group=J, spatial_layers=6).spatial
    *args, positions = example(rows=J)
    want = run(spatial, *args, positions, KNOWN, SELECT)
    drawn, chosen, rest = positions.split([KNOWN, SELECT, N - KNOWN - SELECT], 1)
    other = torch.cat([drawn.flip(1), chosen.flip(1), rest.roll(3, 1)], 1)
    got = run(spatial, *args, other, KNOWN, N - KNOWN)[:, :SELECT]
    torch.testing.assert_close(got.flip(1), want, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_frames_of_a_group_are_told_apart_by_their_embedding_alone() -> None:
    spatial = make("expert", group=J, spatial_layers=6).spatial
    args, order = example(rows=J), torch.tensor([2, 0, 1])

    def difference() -> float:
        there = run(spatial, *args, KNOWN, SELECT)[order]
        return float((there - run(spatial, *(x[order] for x in args), KNOWN, SELECT)).abs().max())

    assert difference() > 1e-2
    spatial.frame.copy_(spatial.frame[:1].expand(J, -1).clone())
    assert difference() < 1e-4


@torch.inference_mode()
def test_each_frame_of_a_group_has_a_canvas_head() -> None:
    """z_j = z + perceptron_j(z), z being what a model of single frames sees."""
    torch.manual_seed(1)
    vit, single = CanvasViT(config(group=J, spatial_layers=6)), CanvasViT(config())
    single.load_state_dict(vit.state_dict(), strict=False)
    z_t, latent = random(2, 6, 32), random(2, N, 4)
    z, canvas, staticness = vit(z_t, latent, latent)
    shared = single(z_t, latent, latent)[0]
    want = torch.stack([shared + head(shared) for head in vit.heads], 1)
    assert want.shape == (2, J, N, 32)
    torch.testing.assert_close(z, want)
    torch.testing.assert_close(canvas, vit.canvas(want))
    vit.residual = True  # to every frame of a group the latest one is added
    torch.testing.assert_close(vit(z_t, latent, 2 * latent)[1], canvas + 2 * latent[:, None])
    torch.testing.assert_close(staticness, vit.staticness(want)[..., 0].sigmoid())
    assert (canvas[:, 1:] - canvas[:, :1]).abs().amax((0, 2, 3)).min() > 0.1


@pytest.mark.parametrize(
    ("group", "message"),
    [(0, r"lie in 1\.\.64, got 0"), (66, r"1\.\.64, got 66"), (4, r"\(6\) must be .* group \(4\)")],
)
def test_a_group_that_cannot_be_is_refused(group: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        grouped(group=group)
    with pytest.raises(ConfigError, match="unified model needs group 1, got 2"):
        unified_config(group=2)
    written = to_dict(grouped())
    assert from_dict(ModelConfig, written) == grouped()
    del written["group"]  # of a bundle from before there were groups
    assert from_dict(ModelConfig, written) == grouped(group=1)


# -- starting from a model of single frames

KINDS: dict[str, dict[str, Any]] = {
    "canvas": {},
    "no-canvas": {"canvas": False, "norm": "mmdit", "condition_attention": "isolated"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_starts_as_copies_of_its_first_frame(kind: str) -> None:
    """Given the same noise all frames are the one the other model draws; later actions are not
    looked at."""
    old = build(small_config(spatial_layers=6, **KINDS[kind]), seed=4)
    new = build(grouped(action_dim=12, **KINDS[kind]), seed=5)
    transfer(old, new, "old")
    new.autoencoder.load_state_dict(old.autoencoder.state_dict())
    latents, action = random(2, 3, 16, 4), random(2, 12)
    noise = sampler.draw_noise(old.config, SAMPLING, seed=0, streams=[0, 1], frame=3)
    each = {k: torch.stack([getattr(noise, k)] * J, 1) for k in ("flow", "canvas", "order")}
    together = dataclasses.replace(noise, **each)

    def step(action: Tensor) -> Tensor:
        start = sampler.start(new, latents)
        return sampler.step(new, SAMPLING, start, together, action)[1].latent

    want = sampler.step(old, SAMPLING, sampler.start(old, latents), noise, action[:, :4])[1].latent
    got = step(action)
    torch.testing.assert_close(got, torch.stack([want] * J, 1), rtol=0, atol=1e-6)
    first = torch.arange(12) < 4
    assert torch.equal(step(action + ~first), got)
    assert (step(action + first) - got).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ({"action_dim": 2, "dim": 48}, {}, "its head_dim is 24, not 16"),
        ({"action_dim": 2, "heads": 4}, {}, "its head_dim is 8, not 16"),
        ({"action_dim": 2, "encoder_layers": 2}, {}, "its encoder_layers is 2, not 1"),
        ({"action_dim": 2, "norm": "shared"}, {}, "its norm is shared, not expert"),
        ({"action_dim": 2, "canvas": False}, {}, r"canvas\.\S+ does not fit"),
        # of which three do not make 6
        ({"action_dim": 4}, {}, r"temporal\.action\.weight does not fit"),
    ],
    ids=["width", "heads", "encoder", "norm", "canvas", "actions"],
)
def test_what_does_not_fit_is_named(old: dict[str, Any], new: dict[str, Any], what: str) -> None:
    given = build(small_config("given", **{"spatial_layers": 6} | old))
    with pytest.raises(ConfigError, match=rf"there: another model; {what}"):
        transfer(given, build(grouped(**new)), "there")


def test_a_deeper_model_has_no_place() -> None:
    given = build(small_config("given", spatial_layers=7, action_dim=2))
    with pytest.raises(ConfigError, match=r"there: .*no place for its spatial\.blocks\.\d"):
        transfer(given, build(grouped()), "there")


@pytest.mark.parametrize("group", [1, 3])
def test_a_model_of_groups_starts_no_other(group: int) -> None:
    given = build(grouped(group=2, action_dim=0))
    with pytest.raises(ConfigError, match=rf"groups of 2 .* groups of {group}"):
        transfer(given, build(small_config(group=group, spatial_layers=6, action_dim=0)), "x")


def test_a_residual_model_starts_with_a_copy_as_its_canvas() -> None:
    """All other weights are those of the model that draws frames, which takes none back."""
    given, network = build(small_config()), build(small_config(residual=True), seed=2)
    transfer(given, network, "given")
    z_t, latest = random(2, 4, 32), random(2, 16, 4)
    assert torch.equal(network.canvas(z_t, torch.zeros_like(latest), latest)[1], latest)
    own = network.state_dict()
    for name, value in given.state_dict().items():
        if not name.startswith(("autoencoder.", "canvas.canvas.")):
            assert torch.equal(own[name], value)
    with pytest.raises(ConfigError, match="given: a residual model; add --set-model residual=true"):
        transfer(network, given, "given")


@pytest.mark.parametrize("group", [1, 3])
def test_convolutions_of_the_canvas_add_nothing_at_first(group: int) -> None:
    drawn = {"group": group, "spatial_layers": 6, "action_dim": 0}
    given = build(small_config(**drawn))
    network = build(small_config(**drawn, canvas_conv=24), seed=2)
    assert len(network.canvas.convs) == network.config.canvas_layers
    example = random(2, 4, 32), random(2, 16, 4), random(2, 16, 4)
    transfer(given, network, "given")
    for got, want in zip(network.canvas(*example), given.canvas(*example), strict=True):
        assert torch.equal(got, want)
    again = build(network.config, seed=3)
    network.canvas.convs[0].conv2.weight.data.fill_(0.5)
    transfer(network, again, "network")
    for got, want in zip(again.canvas(*example), network.canvas(*example), strict=True):
        assert torch.equal(got, want)
    with pytest.raises(ConfigError, match=r"there is no place for its canvas\.convs"):
        transfer(network, given, "given")


# -- the loss


def group_loss(name: str = "next-group", **changes: Any) -> CanvasMarLoss:
    return CanvasMarLoss(build(FAMILIES[name], seed=1), training(**changes))


def clip_of(model: ModelConfig) -> tuple[Tensor, Tensor | None]:
    """Latents (B, T, N, C) and actions (B, T-1, A/J)."""
    one = model.action_dim // model.group
    return random(B, T, 16, 4, seed=7), random(B, T - 1, one, seed=8) if one else None


def begin_of(step: int, group: int = J) -> int:
    return int(draws(step).shared_uniform() * group)


BEGINS = [next(step for step in range(99) if begin_of(step) == begin) for begin in range(J)]
"""A step for each place where the first group can begin."""


def test_groups_are_consecutive_frames_from_every_start() -> None:
    """Latents say which frame of which clip they are: the known tokens, so the targets, are those
    of rows [clip, group, frame]. Groups begin everywhere in turn."""
    loss = group_loss(mask_ratio_min=0.5, mask_ratio_std=0.9)
    number = torch.arange(B * T, dtype=torch.float32).view(B, T)
    spatial, seen = Calls(loss.spatial), set()
    with torch.no_grad():
        for step in range(30):
            loss(number[..., None, None].expand(B, T, 16, 4), None, draws(step))
            if (known := spatial.inputs[4]) is not None:
                begin = int(known[0, 0, 0])
                want = number[:, begin : begin + (T - begin) // J * J].reshape(-1, 1, 1)
                assert torch.equal(known, want.expand_as(known))
                seen.add(begin)
    assert seen == set(range(J))


@pytest.mark.parametrize("step", BEGINS)
def test_canvas_losses_are_of_groups_with_a_frame_before_them(step: int) -> None:
    loss = group_loss(frame_noise=(0.0, 0.0), canvas_noise=(0.0, 0.0), **NEVER)
    canvas, spatial = Calls(loss.canvas), Calls(loss.spatial)  # type: ignore[arg-type]
    latents, actions = clip_of(loss.model_config)
    _, terms = loss(latents, actions, draws(step))
    z, guess, still = (x.unflatten(0, (B, -1)) for x in canvas.output)  # (B, M, J, N, .)
    read, masks = (x.unflatten(0, (B, -1)) for x in (canvas.inputs[1], spatial.inputs[1]))
    errors, misses = [], []
    for m, start in enumerate(range(begin_of(step), T - J + 1, J)):
        assert not start or torch.equal(read[:, m], latents[:, start - 1])
        for j in range(J):
            token = z[:, m, j] if start else loss.spatial.mask.expand(B, 16, -1)
            assert torch.equal(masks[:, m * J + j], token)
            if start:
                errors.append(((guess[:, m, j] - latents[:, start + j]) ** 2).sum(-1))
                misses.append((still[:, m, j] - torch.exp(-errors[-1])) ** 2)
    torch.testing.assert_close(terms["canvas"], torch.stack(errors).mean() / 4)
    torch.testing.assert_close(terms["static"], torch.stack(misses).mean())


def test_a_batch_of_groups_is_the_mean_of_its_clips() -> None:
    loss = group_loss()
    latents, actions = clip_of(loss.model_config)
    assert actions is not None
    whole, _ = loss(latents, actions, draws())
    each = [
        loss(latents[i : i + 1], actions[i : i + 1], draws(rows=range(i, i + 1)))[0]
        for i in range(B)
    ]
    torch.testing.assert_close(whole, torch.stack(each).mean())


@pytest.mark.parametrize("step", BEGINS)
def test_a_residual_group_learns_what_changes_from_the_frame_before_it(
    step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All its frames from the same one, also where that one is the model's own."""
    assert FAMILIES["next-group"].residual
    loss, taught = group_loss(mask_all=1.0), []
    spatial = Calls(loss.spatial)

    def kept(flow: Any, z: Tensor, target: Tensor, *others: Any) -> Tensor:
        taught.append(target)
        return target.sum()

    monkeypatch.setattr(losses, "flow_loss", kept)
    latents, actions = clip_of(loss.model_config)
    history = random(B, T, 16, 4, seed=9)
    with torch.no_grad():
        loss(latents, actions, draws(step), history)
    starts = range(begin_of(step), T - J + 1, J)
    before = [history[:, start - 1] if start else torch.zeros(B, 16, 4) for start in starts]
    want = torch.stack(
        [latents[:, s + j] - b for s, b in zip(starts, before, strict=True) for j in range(J)], 1
    ).flatten(0, 1)
    hidden = spatial.inputs[2][..., None].expand_as(want)
    assert torch.equal(taught[0], want.gather(1, hidden))


@pytest.mark.parametrize("begin", range(J))
def test_a_group_is_told_the_actions_that_lead_to_its_frames(begin: int) -> None:
    model, options = FAMILIES["next-group"], training(**NEVER)
    latents, actions = clip_of(model)
    assert actions is not None
    starts = torch.arange(begin, T - J + 1, J)
    _, _, moved, given = told_history(model, options, latents, actions, draws(), starts)
    assert moved is not None
    told = set(starts.tolist()) - {0}  # no action leads to the first frame
    assert torch.equal(given, torch.tensor([float(i in told) for i in range(T)]).expand(B, T))
    for i in told:
        assert torch.equal(moved[:, i], actions[:, i - 1 : i - 1 + J].flatten(1))
    *_, given = told_history(model, options, latents, None, draws(), starts)
    assert not given.any()  # type: ignore[union-attr]


@pytest.mark.parametrize("name", GROUPS)
def test_training_computes_what_sampling_does(name: str) -> None:
    """Of a clip that was sampled, with the sampler's noise for the last group and the tokens of
    its last step hidden, training conditions the flow head on the same z."""
    frames = 6
    changes = {"dim": 48, "context_frames": frames}  # so that shapes tell noises apart
    config = dataclasses.replace(FAMILIES[name], **changes)
    group, start, count = config.group, frames - config.group, frames // config.group
    model = build(config, seed=4)
    sampling = SamplingConfig(
        ar_steps=3, flow_steps=2, temporal_guidance=1.0, canvas_guidance=1.0,
        frame_noise=0.35, canvas_noise=0.15,
    )  # fmt: skip
    actions = random(B, frames - 1, config.action_dim // group) if config.action_dim else None
    spatial, state, drawn = Calls(model.spatial), sampler.empty_state(model, B), []
    for frame in range(0, frames, group):
        noise = sampler.draw_noise(config, sampling, seed=3, streams=range(B), frame=frame)
        told = (
            None if actions is None or frame < start else group_actions(actions, frame - 1, group)
        )
        state, sample = sampler.step(model, sampling, state, noise, told)
        drawn.append(sample.latent)
    expected, hidden = spatial.output.clone(), spatial.inputs[2].clone()

    order = torch.rand(B, frames, 16)
    first = torch.linspace(-1, -0.5, hidden.shape[1]).expand(len(hidden), -1)
    last = order[:, start:].flatten(0, 1).scatter(1, hidden, first)
    order[:, start:] = last.unflatten(0, (B, group))
    frame_noise, canvas_noise = torch.zeros(B, count, 16, 4), torch.zeros(B, frames, 16, 48)
    frame_noise[:, -1], canvas_noise[:, start:] = noise.frame, noise.canvas
    given = torch.zeros(B, 1 + frames)  # actions of the last group and of no other
    given[:, [0, 1 + start]] = 1
    options = training(
        **NEVER | {"action_drop": 0.5}, frame_noise=(0.35, 0.35), canvas_noise=(0.15, 0.15),
        mask_ratio_min=(hidden.shape[1] - 0.5) / 16,
    )  # fmt: skip
    numbers = Given(0.0, order=order, frame=frame_noise, canvas=canvas_noise, given=given)
    with torch.no_grad():
        CanvasMarLoss(model, options)(torch.cat(drawn, 1), actions, numbers)

    def of_last_group(x: Tensor) -> Tensor:
        return x.unflatten(0, (B, count, group))[:, -1].flatten(0, 1)

    assert torch.equal(of_last_group(spatial.inputs[2]), hidden)
    torch.testing.assert_close(of_last_group(spatial.output), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("transferred", [False, True], ids=["fresh", "transferred"])
def test_every_weight_learns(name: str, transferred: bool) -> None:
    """Those, too, that are silent at first. Idle are expert norms of tokens a layer never sees, and
    of those that nobody reads behind the last attention."""
    config = FAMILIES[name]
    model = build(config, seed=1)
    if transferred:
        single = {"group": 1, "action_dim": config.action_dim // config.group}
        transfer(build(dataclasses.replace(config, **single)), model, "single")
    drops = {"canvas_drop": 0.2, "temporal_drop": 0.2, "both_drop": 0.2}
    loss = CanvasMarLoss(model, training(mask_ratio_min=0.5, **drops))
    optimizer = torch.optim.SGD(loss.parameters(), 1e-3)
    for step in range(6):
        loss(*clip_of(config), draws(step))[0].backward()
        optimizer.step()
    grads = {n: p.grad for n, p in loss.named_parameters()}
    idle = {n for n, grad in grads.items() if grad is None or not grad.any()}
    assert all(grad is None or grad.isfinite().all() for grad in grads.values())
    early = "".join(map(str, range(config.encoder_layers)))
    unused = rf"spatial\.blocks\.([{early}]\.norm[12]\.experts\.1|5\.norm2\.experts\.[02])\."
    assert idle == {n for n in grads if re.match(unused, n)}


@pytest.mark.parametrize("name", GROUPS)
def test_bf16_is_the_same_loss(name: str) -> None:
    loss = group_loss(name)
    exact, _ = loss(*clip_of(loss.model_config), draws())
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = loss(*clip_of(loss.model_config), draws())
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0)


def test_a_few_clips_are_learned_by_heart() -> None:
    loss = group_loss(flow_repeat=1, **NEVER)
    optimizer, totals = torch.optim.AdamW(loss.parameters(), 3e-3), []
    for i in range(12 * J):
        total, _ = loss(*clip_of(loss.model_config), draws(BEGINS[i % J]))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.detach())
    assert sum(totals[-J:]) < 0.5 * sum(totals[:J])


@pytest.mark.parametrize("frames", range(5, 13, 2))
def test_clips_that_a_stage_takes_have_a_loss_wherever_groups_begin(frames: int) -> None:
    """Clips that may not hold a group with a frame before it are refused or have a loss, too."""
    try:
        stage = ModelStage(build(grouped()), SAMPLING, training(), Waves(frames=frames))
    except InputError:
        assert 1 + frames // 2 < 2 * J
        return
    for step in BEGINS:
        total, _ = stage.loss(random(B, 1 + frames // 2, 16, 4), None, draws(step))
        assert total.isfinite()


# -- continuing clips


def test_actions_beyond_the_clip_are_none() -> None:
    actions = torch.arange(1.0, 11).view(1, 5, 2)
    assert group_actions(actions, 1, 3).tolist() == [[3, 4, 5, 6, 7, 8]]
    assert group_actions(actions, 3, 3).tolist() == [[7, 8, 9, 10, 0, 0]]
    assert group_actions(actions, 4, 1).tolist() == [[9, 10]]


def test_continued_clips_end_where_they_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups under their own actions, the last one cut."""
    monkeypatch.setattr(torch, "autocast", lambda *_: torch.autograd.set_grad_enabled(False))
    model, clips = build(grouped(action_dim=12), seed=3), Waves(frames=13).clips(0, 2)
    assert isinstance(clips, Clips)
    assert clips.actions is not None
    actions = latent_actions(clips.actions, 2)
    state, film = sampler.start(model, sampler.encode(model, clips.frames[:, :3])), []
    for frame in (2, 5):
        noise = sampler.draw_noise(model.config, SAMPLING, seed=5, streams=[0, 1], frame=frame)
        told = group_actions(actions, frame - 1, J)
        state, sample = sampler.step(model, SAMPLING, state, noise, told)
        film.append(sample.frames)
    out = continue_clips(model, SAMPLING, clips, context=2, seed=5, canvas=True)
    assert torch.equal(out.frames, torch.cat([clips.frames[:, :3], *film], 1)[:, :13])
    assert out.canvas is not None
    assert out.canvas.shape == (2, 2, 16, 16, 3)
