"""Temporal ViT: the ring cache equals banded attention, and both equal a NumPy transformer.

Letters as in `canvasmar_rt.config`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.special import erf
from torch import Tensor

from canvasmar_rt.components import MASKED
from canvasmar_rt.config import AutoencoderConfig, FlowConfig, ModelConfig
from canvasmar_rt.models.canvasmar import TemporalViT
from canvasmar_rt.models.families import build
from canvasmar_rt.models.layers import Attention, Rotary, attention, rotate
from canvasmar_rt.schedule import time_rotation

Array = npt.NDArray[np.float64]
F = 4  # context frames


def config(**changes: Any) -> ModelConfig:
    """4x6 latents, P = 6 temporal tokens in 2 rows of 3."""
    values: dict[str, Any] = {
        "name": "tiny",
        "autoencoder": AutoencoderConfig(
            height=8, width=12, temporal_compression=2, latent_channels=4, widths=(8,)
        ),
        "flow": FlowConfig(width=16, blocks=1),
        "dim": 32,
        "heads": 2,
        "temporal_layers": 2,
        "canvas_layers": 1,
        "spatial_layers": 2,
        "encoder_layers": 1,
        "context_frames": F,
        "action_dim": 3,
    }
    return ModelConfig(**values | changes)


VARIANTS = {
    "actions": config(),
    "no-actions": config(action_dim=0),
    "patch1": config(temporal_patch=1, dim=64),
    "small-heads": config(heads=4, temporal_layers=1),
}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def temporal(c: ModelConfig, seed: int = 0) -> TemporalViT:
    """Weights and norms that are all away from their defaults."""
    model = build(c, seed).temporal
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def inputs(c: ModelConfig, frames: int, batch: int = 2, seed: int = 3) -> dict[str, Any]:
    """A clip that starts from the BOS, with an action at some steps only."""
    g = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, frames, c.tokens, c.autoencoder.latent_channels, generator=g)
    is_first = torch.zeros(batch, frames)
    is_first[:, 0] = 1
    given = (torch.rand(batch, frames, generator=g) < 0.6).float()
    given[0, 0], given[-1, -1] = 0, 1
    actions = torch.randn(batch, frames, max(c.action_dim, 1), generator=g)
    return {
        "latents": latents,
        "is_first": is_first,
        "actions": actions if c.action_dim else None,
        "given": given if c.action_dim else None,
    }


def whole(model: TemporalViT, clip: dict[str, Any], start: int = 0) -> Tensor:
    frames = clip["latents"].shape[1]
    pairs = model.config.time_rotary_pairs
    times = np.stack([time_rotation(start + i, pairs) for i in range(frames)])
    return model(
        clip["latents"], clip["is_first"], clip["actions"], clip["given"], torch.from_numpy(times)
    )


def ring(model: TemporalViT, clip: dict[str, Any], start: int = 0) -> Tensor:
    """The same frame by frame; slots not filled yet hold rubbish, which must not be seen."""
    c = model.config
    batch, frames = clip["latents"].shape[:2]
    shape = (c.context_frames, batch, c.temporal_tokens, c.dim)
    generator = torch.Generator().manual_seed(5)
    caches = [10 * torch.randn(shape, generator=generator) for _ in range(2 * c.temporal_layers)]
    outputs = []
    for i in range(frames):
        slot = (start + i) % c.context_frames
        held = {(start + j) % c.context_frames for j in range(max(0, i - c.context_frames + 1), i)}
        bias = torch.tensor([0.0 if s in held else MASKED for s in range(c.context_frames)])
        z, new = model.step(
            clip["latents"][:, i],
            clip["is_first"][:, i],
            None if clip["actions"] is None else clip["actions"][:, i],
            None if clip["given"] is None else clip["given"][:, i],
            torch.from_numpy(time_rotation(start + i, c.time_rotary_pairs)),
            bias.expand(batch, -1),
            caches,
        )
        for cache, value in zip(caches, new, strict=True):
            cache[slot] = value
        outputs.append(z)
    return torch.stack(outputs, 1)


# -- the NumPy oracle


def rotation_angles(c: ModelConfig, time: int) -> Array:
    """Angle (P, Dh/2) of every channel pair of every token of a frame, from the definition: the
    first Dh/8 pairs turn with time, the next with y, the others with x; base 100."""
    pairs = c.head_dim // 2
    t_pairs = c.head_dim // 8
    y_pairs = (pairs - t_pairs) // 2
    x_pairs = pairs - t_pairs - y_pairs
    rows = c.autoencoder.latent_height // c.temporal_patch
    columns = c.autoencoder.latent_width // c.temporal_patch
    out = []
    for y in range(rows):
        for x in range(columns):
            angles = [time * 100.0 ** (-i / t_pairs) for i in range(t_pairs)]
            angles += [y * 100.0 ** (-i / y_pairs) for i in range(y_pairs)]
            angles += [x * 100.0 ** (-i / x_pairs) for i in range(x_pairs)]
            out.append(angles)
    return np.array(out)


def rotate_head(x: Array, angle: Array) -> Array:
    """Rotate pair (i, i + Dh/2) of one head x (L, Dh) as a complex number."""
    half = x.shape[-1] // 2
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], -1)


def weights(module: torch.nn.Module) -> tuple[Array, Array]:
    return module.weight.double().numpy(), module.bias.double().numpy()


def linear(x: Array, module: torch.nn.Module) -> Array:
    w, b = weights(module)
    return x @ w.T + b


def layer_norm(x: Array, module: torch.nn.Module) -> Array:
    w, b = weights(module)
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w + b


def gelu(x: Array) -> Array:
    return x * (1 + erf(x / np.sqrt(2))) / 2


def attend(
    c: ModelConfig, x: Array, module: Attention, angle: Array, visible: npt.NDArray[np.bool_]
) -> Array:
    """One attention layer over x (L, D): rotary, softmax, heads; `visible` (L, L)."""
    q, k, v = np.split(linear(x, module.qkv), 3, axis=-1)
    heads = []
    for h in range(c.heads):
        part = slice(h * c.head_dim, (h + 1) * c.head_dim)
        scores = rotate_head(q[:, part], angle) @ rotate_head(k[:, part], angle).T
        scores = np.where(visible, scores / np.sqrt(c.head_dim), -np.inf)
        share = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append(share / share.sum(-1, keepdims=True) @ v[:, part])
    return linear(np.concatenate(heads, -1), module.out)


def numpy_whole(model: TemporalViT, clip: dict[str, Any], row: int, start: int = 0) -> Array:
    """z_t (T, P, D) of one row of a clip."""
    c = model.config
    p, h, w = c.temporal_patch, c.autoencoder.latent_height, c.autoencoder.latent_width
    tokens, channels = c.temporal_tokens, c.autoencoder.latent_channels
    frames = clip["latents"].shape[1]
    sequence, angles = [], []
    for i in range(frames):
        if clip["is_first"][row, i]:
            x = model.bos.double().numpy()
        else:
            grid = clip["latents"][row, i].double().numpy().reshape(h, w, channels)
            patches = [
                grid[y : y + p, x : x + p].reshape(-1)
                for y in range(0, h, p)
                for x in range(0, w, p)
            ]
            x = linear(np.stack(patches), model.embed)
        if c.action_dim:
            told = linear(clip["actions"][row, i].double().numpy(), model.action)
            x = x + (told if clip["given"][row, i] else model.no_action.double().numpy())
        sequence.append(x)
        angles.append(rotation_angles(c, start + i))
    x, angle = np.concatenate(sequence), np.concatenate(angles)
    frame = np.arange(frames).repeat(tokens)
    age = frame[:, None] - frame[None]
    visible = (age >= 0) & (age < c.context_frames)
    for block in model.blocks:
        x = x + attend(c, layer_norm(x, block.norm1), block.attn, angle, visible)
        first, _, second = block.mlp
        x = x + linear(gelu(linear(layer_norm(x, block.norm2), first)), second)
    return layer_norm(x, model.norm).reshape(frames, tokens, c.dim)


# -- rotary and attention


@pytest.mark.parametrize("c", [VARIANTS["actions"], VARIANTS["small-heads"]], ids=["16", "8"])
def test_rotary_is_its_definition(c: ModelConfig) -> None:
    rotary = Rotary(c.head_dim, 2, 3)
    times = [0, 3, 12]
    tables = rotary.tables(
        torch.from_numpy(np.stack([time_rotation(t, c.time_rotary_pairs) for t in times]))
    )
    x = torch.randn(2, 3 * 6, c.dim, generator=torch.Generator().manual_seed(0))
    got = rotate(x, tables, c.heads).double().numpy()
    angle = np.concatenate([rotation_angles(c, t) for t in times])
    for row in range(2):
        for h in range(c.heads):
            part = slice(h * c.head_dim, (h + 1) * c.head_dim)
            want = rotate_head(x[row, :, part].double().numpy(), angle)
            np.testing.assert_allclose(got[row, :, part], want, atol=2e-6)


def test_rotation_keeps_lengths_and_depends_on_distance_only() -> None:
    c = VARIANTS["actions"]
    rotary = Rotary(c.head_dim, 2, 3)
    g = torch.Generator().manual_seed(1)
    q, k = torch.randn(1, 6, c.dim, generator=g), torch.randn(1, 6, c.dim, generator=g)

    def scores(time_q: int, time_k: int) -> Tensor:
        turned = []
        for x, time in ((q, time_q), (k, time_k)):
            t = torch.from_numpy(time_rotation(time, c.time_rotary_pairs))[None]
            out = rotate(x, rotary.tables(t), c.heads)
            torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))
            turned.append(out.unflatten(-1, (c.heads, -1)))
        return torch.einsum("rlhd,rmhd->hlm", *turned)

    near = scores(5, 2)
    torch.testing.assert_close(scores(105, 102), near, rtol=1e-4, atol=1e-4)
    assert (scores(5, 3) - near).abs().max() > 0.1


def test_attention_is_its_definition() -> None:
    g = torch.Generator().manual_seed(2)
    q = torch.randn(2, 3, 32, generator=g)
    k, v = torch.randn(2, 2, 5, 32, generator=g).unbind(0)
    bias = torch.randn(2, 4, 3, 5, generator=g)
    got = attention(q, k, v, 4, bias).numpy()
    for row in range(2):
        for h in range(4):
            part = slice(8 * h, 8 * h + 8)
            score = q[row, :, part].numpy() @ k[row, :, part].numpy().T / np.sqrt(8)
            share = np.exp(score + bias[row, h].numpy())
            want = share / share.sum(-1, keepdims=True) @ v[row, :, part].numpy()
            np.testing.assert_allclose(got[row, :, part], want, atol=1e-5)


# -- the whole transformer


@pytest.mark.parametrize("name", VARIANTS)
def test_clip_equals_numpy(name: str) -> None:
    model = temporal(VARIANTS[name])
    clip = inputs(model.config, 2 * F)
    got = whole(model, clip).double().numpy()
    for row in range(2):
        np.testing.assert_allclose(got[row], numpy_whole(model, clip, row), atol=2e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_ring_equals_clip_through_three_turns(name: str) -> None:
    model = temporal(VARIANTS[name])
    clip = inputs(model.config, 3 * F + 1)
    want = whole(model, clip)
    assert want.std() > 0.1
    torch.testing.assert_close(ring(model, clip), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frames", [1, 2])
def test_ring_of_few_frames(frames: int) -> None:
    """One frame of context is the frame itself; two wrap at every other step."""
    model = temporal(config(context_frames=frames))
    clip = inputs(model.config, 6)
    torch.testing.assert_close(ring(model, clip), whole(model, clip), rtol=1e-4, atol=1e-4)


def test_late_frames_equal_early_ones() -> None:
    """Only time differences matter, at frame ten million as well."""
    model = temporal(VARIANTS["actions"])
    clip = inputs(model.config, 2 * F + 1)
    early = whole(model, clip)
    for start in (1, 10_007, 10**7):
        torch.testing.assert_close(ring(model, clip, start), early, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(whole(model, clip, start), early, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("run", [whole, ring])
def test_influence_ends_with_the_window(run: Any, layers: int) -> None:
    """One layer sees F frames, each further one F - 1 more; never a later frame."""
    model = temporal(config(temporal_layers=layers))
    clip = inputs(model.config, 3 * F, batch=1)
    before = run(model, clip)
    changed = 2
    other = dict(clip, latents=clip["latents"].clone())
    other["latents"][:, changed] += 3.0
    difference = (run(model, other) - before).abs().amax((0, 2, 3))
    reach = layers * (F - 1)
    seen = slice(changed, changed + reach + 1)
    assert difference[:changed].max() == 0
    assert difference[seen].min() > 1e-5
    assert difference[changed : changed + F].min() > 1e-3
    assert difference[changed + reach + 1 :].max() < 1e-6
    assert len(difference) > changed + reach + 1


def test_attention_within_a_frame_is_bidirectional() -> None:
    model = temporal(config(temporal_layers=1))
    clip = inputs(model.config, 3, batch=1)
    before = whole(model, clip)
    for token in (0, 23):  # corners: the first and the last patch
        other = dict(clip, latents=clip["latents"].clone())
        other["latents"][:, 2, token] += 3.0
        difference = (whole(model, other) - before).abs().amax(-1)[0]
        assert difference[2].min() > 1e-4
        assert difference[:2].max() == 0


# -- BOS and actions


def test_the_latent_is_ignored_at_the_start() -> None:
    model = temporal(VARIANTS["actions"])
    clip = inputs(model.config, 4)
    other = dict(clip, latents=clip["latents"].clone())
    other["latents"][:, 0] = 100.0
    torch.testing.assert_close(ring(model, other), ring(model, clip))
    started = dict(clip, is_first=torch.zeros_like(clip["is_first"]))
    assert (ring(model, started)[:, 0] - ring(model, clip)[:, 0]).abs().max() > 0.1


def test_an_action_counts_from_its_step_on_and_only_if_given() -> None:
    model = temporal(VARIANTS["actions"])
    clip = inputs(model.config, 5)
    clip["given"][:] = torch.tensor([1.0, 1, 0, 1, 1])
    before = whole(model, clip)
    ignored = dict(clip, actions=clip["actions"].clone())
    ignored["actions"][:, 2] += 5.0
    assert torch.equal(whole(model, ignored), before)
    heeded = dict(clip, actions=clip["actions"].clone())
    heeded["actions"][:, 3] += 5.0
    difference = (whole(model, heeded) - before).abs().amax((0, 2, 3))
    assert difference[:3].max() == 0
    assert difference[3:].min() > 1e-3


def test_rows_may_be_at_different_times_of_their_videos() -> None:
    """Rows have their own BOS flag and visibility: a row restarted beside an old one."""
    model = temporal(VARIANTS["actions"])
    c = model.config
    clip = inputs(c, 1)
    shape = (F, 2, c.temporal_tokens, c.dim)
    generator = torch.Generator().manual_seed(6)
    caches = [torch.randn(shape, generator=generator) for _ in range(2 * c.temporal_layers)]
    first = torch.tensor([1.0, 0.0])
    bias = torch.tensor([[MASKED] * F, [0.0, MASKED, 0.0, 0.0]])
    time = torch.from_numpy(time_rotation(9, c.time_rotary_pairs))

    def step(rows: slice) -> tuple[Tensor, list[Tensor]]:
        return model.step(
            clip["latents"][rows, 0],
            first[rows],
            clip["actions"][rows, 0],
            clip["given"][rows, 0],
            time,
            bias[rows],
            [cache[:, rows] for cache in caches],
        )

    together, new = step(slice(0, 2))
    for row in range(2):
        alone, alone_new = step(slice(row, row + 1))
        torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=1e-5)
        for a, b in zip(alone_new, new, strict=True):
            torch.testing.assert_close(a[0], b[row], rtol=1e-5, atol=1e-5)


def test_a_step_changes_none_of_its_inputs() -> None:
    model = temporal(VARIANTS["actions"])
    c = model.config
    clip = inputs(c, 1)
    caches = [torch.randn(F, 2, c.temporal_tokens, c.dim) for _ in range(2 * c.temporal_layers)]
    given = [
        clip["latents"][:, 0],
        clip["is_first"][:, 0],
        clip["actions"][:, 0],
        clip["given"][:, 0],
        torch.from_numpy(time_rotation(2, c.time_rotary_pairs)),
        torch.zeros(2, F),
    ]
    before = [x.clone() for x in (*given, *caches)]
    model.step(*given, caches)
    assert all(torch.equal(a, b) for a, b in zip((*given, *caches), before, strict=True))
