"""Spatial MAR and Canvas ViT: a direct oracle of the whole forward pass, and what may matter.

The oracle keeps all tokens of all layers in one sequence, with segments and a mask written out
token by token: no selection of queries, no cached condition, no gathering. Letters as in
`canvasmar_rt.config`; M tokens not drawn yet, n known ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from canvasmar_rt.components import components
from canvasmar_rt.config import AutoencoderConfig, FlowConfig, ModelConfig
from canvasmar_rt.models.canvasmar import CanvasMAR, SpatialBlock, SpatialMAR, gather_tokens
from canvasmar_rt.models.families import build
from canvasmar_rt.models.graphs import graph
from canvasmar_rt.models.layers import Experts

N, P, D, C = 24, 6, 32, 4


def config(**changes: Any) -> ModelConfig:
    """4x6 latents, three spatial layers of which one is an encoder layer."""
    values: dict[str, Any] = {
        "name": "tiny",
        "autoencoder": AutoencoderConfig(
            height=8, width=12, temporal_compression=2, latent_channels=C, widths=(8,)
        ),
        "flow": FlowConfig(width=16, blocks=1),
        "dim": D,
        "heads": 2,
        "temporal_layers": 1,
        "canvas_layers": 2,
        "spatial_layers": 3,
        "encoder_layers": 1,
        "context_frames": 3,
    }
    return ModelConfig(**values | changes)


NORMS = ("shared", "expert", "mmdit")
KINDS = list(itertools.product(NORMS, ("all", "isolated")))
every_kind = pytest.mark.parametrize(("norm", "attend"), KINDS)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def make(norm: str, attend: str = "all", **changes: Any) -> CanvasMAR:
    """A model whose norms and biases are all away from their defaults, each by its own amount."""
    model = build(config(norm=norm, condition_attention=attend, **changes))
    generator = torch.Generator().manual_seed(1)
    for parameter in (*model.spatial.parameters(), *(model.canvas or nn.Module()).parameters()):
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def random(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def order(rows: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(N, generator=generator) for _ in range(rows)])


def run(
    spatial: SpatialMAR,
    condition: Tensor,
    canvas: Tensor,
    latent: Tensor,
    positions: Tensor,
    known: int,
    select: int,
) -> Tensor:
    """The next `select` tokens of `positions` (R, N) after `known` of them are drawn."""
    cached = spatial.condition_keys_values(condition) if spatial.isolated else condition
    drawn, rest = positions[:, :known], positions[:, known:]
    if not known:
        return spatial(cached, canvas, rest, select)
    return spatial(cached, canvas, rest, select, gather_tokens(latent, drawn), drawn)


def example(rows: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Condition, canvas tokens, latents and an order."""
    return (
        random(rows, P, D, seed=4),
        random(rows, N, D, seed=5),
        random(rows, N, C, seed=6),
        order(rows),
    )


# -- the oracle

CONDITION, MASK, KNOWN = 0, 1, 2


def expert_of(experts: Experts, segment: int) -> nn.Module:
    """Which weights serve a token: three norms are one each, two are known and all others."""
    count = len(experts.experts)
    return experts.experts[{1: 0, 2: int(segment == KNOWN), 3: segment}[count]]


def oracle_block(block: SpatialBlock, x: Tensor, segments: list[int], isolated: bool) -> Tensor:
    """x (L, D), one row; `segments` (L)."""

    def each(experts: Experts, y: Tensor) -> Tensor:
        by_segment = torch.stack([expert_of(experts, s)(y) for s in (CONDITION, MASK, KNOWN)])
        return by_segment[segments, range(len(segments))]

    q, k, v = each(block.qkv, each(block.norm1, x)).chunk(3, dim=-1)
    hidden = torch.tensor(
        [
            [isolated and query == CONDITION and key != CONDITION for key in segments]
            for query in segments
        ]
    )
    heads = []
    for qh, kh, vh in zip(*(y.chunk(block.heads, -1) for y in (q, k, v)), strict=True):
        scores = (qh @ kh.T / qh.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf)
        heads.append(scores.softmax(-1) @ vh)
    x = x + each(block.out, torch.cat(heads, -1))
    return x + each(block.mlp, each(block.norm2, x))


def oracle(
    spatial: SpatialMAR, condition: Tensor, canvas: Tensor, latent: Tensor, drawn: list[int]
) -> dict[int, Tensor]:
    """Embedding z of every position that is not drawn, for one row, in raster order."""
    known = sorted(drawn)
    rest = [j for j in range(N) if j not in drawn]
    x = list(condition)
    x += [spatial.embed(latent[j]) + spatial.encoder_position[j] for j in known]
    segments = [CONDITION] * P + [KNOWN] * len(known)
    x = torch.stack(x)
    for layer in range(spatial.config.encoder_layers):
        x = oracle_block(spatial.blocks[layer], x, segments, spatial.isolated)
    placed = [x[P + i] + spatial.decoder_position[j] for i, j in enumerate(known)]
    masks = [canvas[j] + spatial.decoder_position[j] for j in rest]
    x = torch.stack([*x[:P], *placed, *masks])
    segments += [MASK] * len(rest)
    for layer in range(spatial.config.encoder_layers, spatial.config.spatial_layers):
        x = oracle_block(spatial.blocks[layer], x, segments, spatial.isolated)
    out = F.layer_norm(x[P + len(known) :], (D,), spatial.norm.weight, spatial.norm.bias)
    return dict(zip(rest, out, strict=True))


@every_kind
@pytest.mark.parametrize(("known", "select"), [(0, 5), (5, 7), (12, 12), (23, 1), (0, 24)])
def test_forward_equals_the_oracle(norm: str, attend: str, known: int, select: int) -> None:
    spatial = make(norm, attend).spatial
    condition, canvas, latent, positions = example()
    got = run(spatial, condition, canvas, latent, positions, known, select)
    assert got.shape == (2, select, D)
    for row in range(2):
        want = oracle(
            spatial, condition[row], canvas[row], latent[row], positions[row, :known].tolist()
        )
        chosen = positions[row, known : known + select].tolist()
        torch.testing.assert_close(
            got[row], torch.stack([want[j] for j in chosen]), rtol=1e-4, atol=1e-4
        )


# -- what may and may not matter


@every_kind
@pytest.mark.parametrize("known", [0, 7])
def test_selecting_is_slicing(norm: str, attend: str, known: int) -> None:
    spatial = make(norm, attend).spatial
    args = example()
    every = run(spatial, *args, known, N - known)
    for select in (1, 6, N - known):
        part = run(spatial, *args, known, select)
        torch.testing.assert_close(part, every[:, :select], rtol=1e-4, atol=1e-5)


@every_kind
def test_the_order_of_other_tokens_does_not_matter(norm: str, attend: str) -> None:
    spatial = make(norm, attend).spatial
    condition, canvas, latent, positions = example()
    known, select = 7, 6
    want = run(spatial, condition, canvas, latent, positions, known, select)
    drawn, chosen, rest = positions.split([known, select, N - known - select], 1)
    shuffled = torch.cat([drawn, chosen, rest.flip(1)], 1)
    torch.testing.assert_close(
        run(spatial, condition, canvas, latent, shuffled, known, select), want, rtol=1e-4, atol=1e-5
    )
    shuffled = torch.cat([drawn.flip(1), chosen, rest], 1)
    torch.testing.assert_close(
        run(spatial, condition, canvas, latent, shuffled, known, select), want, rtol=1e-4, atol=1e-5
    )
    shuffled = torch.cat([drawn, chosen.flip(1), rest], 1)
    torch.testing.assert_close(
        run(spatial, condition, canvas, latent, shuffled, known, select),
        want.flip(1),
        rtol=1e-4,
        atol=1e-5,
    )


@every_kind
def test_every_input_is_heeded_where_it_should_be(norm: str, attend: str) -> None:
    """Latents not drawn and canvas tokens already drawn have no influence, all others have."""
    spatial = make(norm, attend).spatial
    condition, canvas, latent, positions = example()
    known = 7
    before = run(spatial, condition, canvas, latent, positions, known, N - known)

    def change(**given: Tensor) -> Tensor:
        """How much each token of the result changes."""
        args = {"condition": condition, "canvas": canvas, "latent": latent} | given
        after = run(spatial, **args, positions=positions, known=known, select=N - known)
        return (after - before).abs().amax(-1)

    def negated(x: Tensor, index: Tensor) -> Tensor:
        out = x.clone()
        out[torch.arange(2)[:, None], index] *= -1
        return out

    drawn, rest = positions[:, :known], positions[:, known:]
    assert change(condition=-condition).min() > 1e-3
    assert change(latent=negated(latent, drawn[:, :1])).min() > 1e-4
    assert change(canvas=negated(canvas, rest[:, -1:])).min() > 1e-4
    assert change(latent=negated(latent, rest)).max() == 0
    assert change(canvas=negated(canvas, drawn)).max() == 0


@every_kind
def test_rows_do_not_mix(norm: str, attend: str) -> None:
    spatial = make(norm, attend).spatial
    args = example(rows=3)
    together = run(spatial, *args, 7, 6)
    for row in range(3):
        alone = run(spatial, *(x[row : row + 1] for x in args), 7, 6)
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-5)


# -- experts


def test_experts_serve_their_segments() -> None:
    x = random(1, 9, D)
    lengths = (2, 4, 3)
    for count, sizes in ((1, [9]), (3, [2, 4, 3])):
        experts = Experts(count, lambda: nn.Linear(D, D))
        want = [e(part) for e, part in zip(experts.experts, x.split(sizes, 1), strict=True)]
        torch.testing.assert_close(experts(x, lengths), torch.cat(want, 1), rtol=1e-5, atol=1e-5)
    three = Experts(3, lambda: nn.Linear(D, D))
    assert torch.equal(three(x, (0, 9, 0)), three.experts[1](x))
    assert torch.equal(three(x, (0, 0, 9)), three.experts[2](x))


def segment_changes(block: SpatialBlock, parameter: Tensor) -> tuple[bool, bool, bool]:
    """Which of [condition | mask | known] a block computes otherwise after a parameter changed."""
    lengths = (P, 10, 5)
    x = random(1, sum(lengths), D, seed=8)
    known = P + 10
    pieces = (x[:, :known], x[:, known:]) if block.apart else (x, None)

    def made() -> Tensor:
        return torch.cat([y for y in block(pieces, lengths)[0] if y is not None], dim=1)

    before = made()
    parameter.add_(0.5)
    after = made()
    parameter.sub_(0.5)
    condition, mask, known = (
        bool(part.abs().max() > 1e-4) for part in (after - before).split(lengths, 1)
    )
    return condition, mask, known


def test_expert_norms_are_one_for_each_segment() -> None:
    block = make("expert").spatial.blocks[0]
    for segment, expert in enumerate(block.norm2.experts):
        want = tuple(i == segment for i in range(3))
        assert segment_changes(block, expert.weight) == want
        assert segment_changes(block, expert.bias) == want
    # the first norm feeds the keys of everyone, but only this segment's queries
    for segment, expert in enumerate(block.norm1.experts):
        x = random(1, P + 15, D, seed=8)
        before = block.qkv(block.norm1(x, (P, 10, 5)), (P, 10, 5))
        expert.weight.mul_(1.5)
        after = block.qkv(block.norm1(x, (P, 10, 5)), (P, 10, 5))
        changed = [bool(part.abs().max() > 1e-4) for part in (after - before).split((P, 10, 5), 1)]
        assert changed == [i == segment for i in range(3)]
    assert [len(e.experts) for e in (block.qkv, block.out, block.mlp)] == [1, 1, 1]
    assert segment_changes(block, block.mlp.experts[0][0].weight) == (True, True, True)


def test_shared_norms_serve_all() -> None:
    block = make("shared").spatial.blocks[0]
    assert [len(e.experts) for e in (block.norm1, block.norm2, block.qkv)] == [1, 1, 1]
    assert segment_changes(block, block.norm2.experts[0].weight) == (True, True, True)


def test_mmdit_has_a_stream_for_known_tokens_and_one_for_the_others() -> None:
    block = make("mmdit").spatial.blocks[0]
    for part in (block.norm1, block.norm2, block.qkv, block.out, block.mlp):
        assert len(part.experts) == 2
    for part in (block.norm2, block.out):
        assert segment_changes(block, part.experts[0].weight) == (True, True, False)
        assert segment_changes(block, part.experts[1].weight) == (False, False, True)
    assert segment_changes(block, block.mlp.experts[0][0].weight) == (True, True, False)
    assert segment_changes(block, block.mlp.experts[1][0].weight) == (False, False, True)
    # attention is joint: values of one stream reach the tokens of both
    value_bias = block.qkv.experts[1].bias[2 * D :]
    assert segment_changes(block, value_bias) == (True, True, True)


def test_every_expert_is_used_in_a_forward_pass() -> None:
    """With known tokens, every parameter changes the result, but for the branches' vectors, mask
    experts of encoder layers, which see no mask token, and what the last layer would need for
    tokens it does not return."""
    for norm, attend in KINDS:
        model = make(norm, attend)
        spatial = model.spatial
        args = example()
        before = run(spatial, *args, 7, 6)
        last = spatial.config.spatial_layers - 1
        for name, parameter in spatial.named_parameters():
            generator = torch.Generator().manual_seed(len(name))
            kept = parameter.clone()
            parameter.add_(torch.randn(parameter.shape, generator=generator))
            changed = not torch.equal(run(spatial, *args, 7, 6), before)
            parameter.copy_(kept)
            unused = name in ("mask", "no_temporal")
            if name.startswith("blocks."):
                _, layer, part, _, expert, *_ = name.split(".")
                experts = getattr(spatial.blocks[int(layer)], part)
                serves_mask = experts.experts[int(expert)] is expert_of(experts, MASK)
                if int(layer) == last and part in ("norm2", "out", "mlp"):
                    unused = not serves_mask
                elif int(layer) < spatial.config.encoder_layers:
                    unused = serves_mask and len(experts.experts) == 3
            assert changed != unused, (norm, attend, name)


# -- isolated condition


@pytest.mark.parametrize("norm", NORMS)
def test_isolated_condition_does_not_see_the_frame(norm: str) -> None:
    """Keys and values of every layer from the condition alone, equal to those a masked pass over
    the whole sequence gives; a condition that attends to all is another function."""
    model = make(norm, "isolated")
    spatial = model.spatial
    condition, canvas, latent, positions = example(rows=1)
    cached = spatial.condition_keys_values(condition)
    assert len(cached) == spatial.config.spatial_layers
    x = condition[0]
    for block, (key, value) in zip(spatial.blocks, cached, strict=True):
        normed = torch.stack([expert_of(block.norm1, CONDITION)(token) for token in x])
        _, k, v = expert_of(block.qkv, CONDITION)(normed).chunk(3, dim=-1)
        torch.testing.assert_close(key[0], k, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(value[0], v, rtol=1e-4, atol=1e-5)
        # in company of frame tokens, behind the mask
        segments = [CONDITION] * P + [MASK] * 3 + [KNOWN] * 2
        company = torch.cat([x, random(5, D, seed=9)])
        x = oracle_block(block, company, segments, isolated=True)[:P]
    joined = SpatialMAR(config(norm=norm, condition_attention="all")).eval()
    joined.load_state_dict(spatial.state_dict())
    other = run(joined, condition, canvas, latent, positions, 7, 6)
    assert (other - run(spatial, condition, canvas, latent, positions, 7, 6)).abs().max() > 1e-3


# -- guidance branches


@every_kind
def test_branches_substitute_the_learned_vectors(norm: str, attend: str) -> None:
    """Graph of one AR step with three branches, against a pass for each by hand."""
    model = make(norm, attend)
    z_temporal, z_canvas, latent, positions = example()
    temporal_on, canvas_on = torch.tensor([0.0, 1, 1]), torch.tensor([0.0, 0, 1])
    known, select = 7, 6
    tensors = {
        "z_temporal": z_temporal,
        "temporal_on": temporal_on,
        "z_canvas": z_canvas,
        "canvas_on": canvas_on,
        "mask_index": positions[:, known:],
        "select_index": positions[:, known : known + select],
        "partial": latent,
        "known_index": positions[:, :known],
    }
    table = components(model.config)
    if attend == "isolated":
        names = [t.name for t in table["condition"].outputs]
        outputs = graph(model, "condition")(z_temporal, temporal_on)
        tensors |= dict(zip(names, outputs, strict=True))
    (got,) = graph(model, "spatial")(*(tensors[t.name] for t in table["spatial"].inputs))
    assert got.shape == (3, 2, select, D)
    no_temporal = model.spatial.no_temporal.expand(2, P, D)
    mask = model.spatial.mask.expand(2, N, D)
    for branch, (condition, canvas) in enumerate(
        [(no_temporal, mask), (z_temporal, mask), (z_temporal, z_canvas)]
    ):
        want = run(model.spatial, condition, canvas, latent, positions, known, select)
        torch.testing.assert_close(got[branch], want, rtol=1e-4, atol=1e-5)
    assert (got[0] - got[1]).abs().max() > 1e-3
    assert (got[1] - got[2]).abs().max() > 1e-3

    tensors["mask_index"], tensors["select_index"] = positions, positions[:, :select]
    (first,) = graph(model, "spatial_first")(
        *(tensors[t.name] for t in table["spatial_first"].inputs)
    )
    want = run(model.spatial, z_temporal, z_canvas, latent, positions, 0, select)
    torch.testing.assert_close(first[2], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("canvas", [True, False])
@every_kind
def test_a_branch_that_sees_nothing_is_looked_up(norm: str, attend: str, canvas: bool) -> None:
    """What the first AR step gives it is the same for every frame, whatever the order."""
    model = make(norm, attend, canvas=canvas)
    positions = order(2)
    (got,) = graph(model, "unconditional")(positions[:, :6])
    condition = model.spatial.no_temporal.expand(2, P, D)
    mask = model.spatial.mask.expand(2, N, D)
    want = run(model.spatial, condition, mask, random(2, N, C), positions, 0, 6)
    assert got.shape == (1, 2, 6, D)
    torch.testing.assert_close(got[0], want, rtol=1e-4, atol=1e-5)


def test_branch_tokens_are_exact() -> None:
    model = make("expert")
    z_t, z_c = random(2, P, D), random(2, N, D)
    tokens = model.condition_tokens(z_t, torch.tensor([1.0, 0.0]))
    assert torch.equal(tokens[0], z_t)
    assert torch.equal(tokens[1], model.spatial.no_temporal.expand(2, P, D))
    tokens = model.mask_tokens(z_c, torch.tensor([0.0, 1.0]))
    assert torch.equal(tokens[0], model.spatial.mask.expand(2, N, D))
    assert torch.equal(tokens[1], z_c)


def test_without_a_canvas_every_mask_token_is_the_mask_embedding() -> None:
    model = make("expert", canvas=False)
    assert model.canvas is None
    table = components(model.config)
    assert "canvas" not in table
    names = [t.name for t in table["spatial_first"].inputs]
    assert "z_canvas" not in names
    z_temporal, _, latent, positions = example()
    tensors = {
        "z_temporal": z_temporal,
        "temporal_on": torch.ones(1),
        "mask_index": positions,
        "select_index": positions[:, :6],
    }
    (got,) = graph(model, "spatial_first")(*(tensors[name] for name in names))
    mask = model.spatial.mask.expand(2, N, D)
    want = run(model.spatial, z_temporal, mask, latent, positions, 0, 6)
    torch.testing.assert_close(got[0], want, rtol=1e-4, atol=1e-5)


# -- canvas


def convolved(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """3x3 over tokens (N, .) in raster order on the grid of 4x6, which is surrounded by zeros."""
    grid = F.pad(x.unflatten(0, (4, 6)), (0, 0, 1, 1, 1, 1))
    out = sum(
        grid[dy : dy + 4, dx : dx + 6] @ conv.weight[:, :, dy, dx].T
        for dy, dx in itertools.product(range(3), repeat=2)
    )
    assert isinstance(out, Tensor)
    return (out + conv.bias).flatten(0, 1)


@pytest.mark.parametrize("width", [0, 20])
def test_canvas_vit_is_its_definition(width: int) -> None:
    model = make("expert", canvas_conv=width)
    vit = model.canvas
    assert vit is not None
    z_t, latent = random(2, P, D, seed=10), random(2, N, C, seed=11)
    z_c, canvas, staticness = vit(z_t, latent, latent)
    assert (z_c.shape, canvas.shape, staticness.shape) == ((2, N, D), (2, N, C), (2, N))
    for row in range(2):
        x = torch.cat([z_t[row], vit.embed(latent[row]) + vit.position])
        for layer, block in enumerate(vit.blocks):
            q, k, v = block.attn.qkv(
                F.layer_norm(x, (D,), block.norm1.weight, block.norm1.bias)
            ).chunk(3, -1)
            heads = []
            for qh, kh, vh in zip(*(y.chunk(2, -1) for y in (q, k, v)), strict=True):
                heads.append((qh @ kh.T / qh.shape[-1] ** 0.5).softmax(-1) @ vh)
            x = x + block.attn.out(torch.cat(heads, -1))
            h = F.layer_norm(x, (D,), block.norm2.weight, block.norm2.bias)
            x = x + block.mlp[2](F.gelu(block.mlp[0](h)))
            if width:
                conv = vit.convs[layer]
                h = F.layer_norm(x[P:], (D,), conv.norm.weight, conv.norm.bias)
                h = convolved(conv.conv2, F.silu(convolved(conv.conv1, h)))
                x = torch.cat([x[:P], x[P:] + h])
        z = F.layer_norm(x[P:], (D,), vit.norm.weight, vit.norm.bias)
        torch.testing.assert_close(z_c[row], z, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(canvas[row], vit.canvas(z), rtol=1e-4, atol=1e-5)
        logit = vit.staticness(z)[:, 0]
        torch.testing.assert_close(
            staticness[row], 1 / (1 + torch.exp(-logit)), rtol=1e-4, atol=1e-5
        )
    assert 0 < staticness.min() < staticness.max() < 1


def test_both_augmentations_are_interpolations() -> None:
    """Eqs. 11 and 12: f (1 - r) + eps r before, z_c (1 - r') + eps' r' after; heads see no r'."""
    model = make("expert")
    z_t, latent = random(2, P, D, seed=10), random(2, N, C, seed=11)
    eps, eps2 = random(2, N, C, seed=12), random(2, N, D, seed=13)
    run_canvas = graph(model, "canvas")
    r, r2 = 0.3, 0.2
    got = run_canvas(z_t, latent, eps, torch.tensor(r), eps2, torch.tensor(r2))
    assert model.canvas is not None
    z_c, canvas, staticness = model.canvas(z_t, latent * (1 - r) + eps * r, latent)
    torch.testing.assert_close(got[0], z_c * (1 - r2) + eps2 * r2)
    torch.testing.assert_close(got[1], canvas)
    torch.testing.assert_close(got[2], staticness)
    clean = run_canvas(z_t, latent, eps, torch.tensor(0.0), eps2, torch.tensor(0.0))
    for a, b in zip(clean, model.canvas(z_t, latent, latent), strict=True):
        torch.testing.assert_close(a, b)
    noise = run_canvas(z_t, latent, eps, torch.tensor(1.0), eps2, torch.tensor(1.0))
    assert torch.equal(noise[0], eps2)
    torch.testing.assert_close(noise[1], model.canvas(z_t, eps, latent)[1])
