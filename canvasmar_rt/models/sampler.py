"""The reference sampler: plain PyTorch, a pure function of (state, noise, action).

It is the oracle for every engine. It calls the model's modules directly, in the order the paper
describes, and shares nothing with the runtime but the noise, the set sizes and the order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from canvasmar_rt.components import MASKED, autoencoder_states
from canvasmar_rt.config import ModelConfig, SamplingConfig
from canvasmar_rt.models.autoencoder import first_frame_group
from canvasmar_rt.models.canvasmar import CanvasMAR, gather_tokens
from canvasmar_rt.models.graphs import put_tokens
from canvasmar_rt.noise import Purpose, fill_gumbel, fill_normal
from canvasmar_rt.schedule import (
    flow_plan,
    generation_order,
    guidance_branches,
    set_sizes,
    time_rotation,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """Everything a rollout carries from frame to frame; `step` returns a new one.

    latent: (B, N, C), the latest latent frame, not yet seen by the Temporal ViT; zeros at the BOS.
    time: latent frames seen by the Temporal ViT so far; time 0 is the BOS step.
    caches: per layer keys then values (F, B, P, D); slot time % F is written at each step.
    decoder: causal-convolution histories of the decoder.
    """

    latent: Tensor
    time: int
    caches: tuple[Tensor, ...]
    decoder: tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameNoise:
    """All randomness of one latent frame."""

    flow: Tensor  # (B, N, C)
    frame: Tensor  # (B, N, C), eq. 11
    canvas: Tensor  # (B, N, D), eq. 12
    order: Tensor  # (B, K, N), Gumbel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One predicted latent frame: frames uint8 (B, t, H, W, 3), latent and canvas (B, N, C),
    staticness (B, N), order (B, N). Canvas and staticness are None without a canvas. The first
    frame of a video made from nothing stands for the last of its t decoded frames."""

    frames: Tensor
    latent: Tensor
    canvas: Tensor | None
    staticness: Tensor | None
    order: Tensor


def draw_noise(
    config: ModelConfig, sampling: SamplingConfig, *, seed: int, streams: Sequence[int], frame: int
) -> FrameNoise:
    """Noise of one frame, from the counter-based generator (`canvasmar_rt.noise`)."""
    b, n, c = len(streams), config.tokens, config.autoencoder.latent_channels

    def normal(purpose: Purpose, *shape: int) -> Tensor:
        out = np.empty(shape, np.float32)
        fill_normal(out, seed=seed, streams=streams, frame=frame, purpose=purpose)
        return torch.from_numpy(out)

    gumbel = np.empty((b, sampling.ar_steps, n), np.float32)
    fill_gumbel(gumbel, seed=seed, streams=streams, frame=frame, purpose=Purpose.ORDER)
    return FrameNoise(
        flow=normal(Purpose.FLOW, b, n, c),
        frame=normal(Purpose.FRAME_AUGMENTATION, b, n, c),
        canvas=normal(Purpose.CANVAS_AUGMENTATION, b, n, config.dim),
        order=torch.from_numpy(gumbel),
    )


def empty_state(model: CanvasMAR, batch: int) -> State:
    """The state before any frame: the next step reads the BOS embedding."""
    c, ae = model.config, model.config.autoencoder
    like = model.spatial.mask
    cache = like.new_zeros(c.context_frames, batch, c.temporal_tokens, c.dim)
    shapes = autoencoder_states(ae, decoder=True)
    return State(
        latent=like.new_zeros(batch, c.tokens, ae.latent_channels, dtype=torch.float32),
        time=0,
        caches=tuple(cache.clone() for _ in range(2 * c.temporal_layers)),
        decoder=tuple(like.new_zeros(batch, *s) for s in shapes),
    )


@torch.inference_mode()
def encode(model: CanvasMAR, frames: Tensor) -> Tensor:
    """Clip uint8 (B, 1+n*t, H, W, 3) -> latents (B, 1+n, N, C)."""
    ae = model.config.autoencoder
    like = model.spatial.mask
    states = [like.new_zeros(len(frames), *s) for s in autoencoder_states(ae, decoder=False)]
    latents, _ = model.autoencoder.encode(
        first_frame_group(frames, ae.temporal_compression), states
    )
    return latents


def _advance(model: CanvasMAR, state: State, action: Tensor | None) -> tuple[Tensor, State]:
    """Feed the latest latent frame to the Temporal ViT: z_t (B, P, D) and the state after."""
    c = model.config
    batch, device = state.latent.shape[0], state.latent.device
    slot = state.time % c.context_frames
    age = torch.arange(c.context_frames)
    filled = (age < state.time) & (age != slot)
    bias = torch.where(filled, 0.0, MASKED).expand(batch, -1).to(device)
    given = None
    if c.action_dim:
        given = torch.full((batch,), float(action is not None), device=device)
        if action is None:
            action = torch.zeros(batch, c.action_dim, device=device)
    z_temporal, new = model.temporal.step(
        state.latent,
        torch.full((batch,), float(state.time == 0), device=device),
        action,
        given,
        torch.from_numpy(time_rotation(state.time, c.time_rotary_pairs)).to(device),
        bias,
        state.caches,
    )
    caches = []
    for cache, value in zip(state.caches, new, strict=True):
        cache = cache.clone()
        cache[slot] = value
        caches.append(cache)
    return z_temporal, dataclasses.replace(state, time=state.time + 1, caches=tuple(caches))


@torch.inference_mode()
def start(model: CanvasMAR, latents: Tensor, actions: Tensor | None = None) -> State:
    """State after context latents (B, n, N, C), n >= 1; `actions` (B, n-1, A) between them.

    The first pixel frame of the video is its own latent frame, so the decoder sees it as such."""
    state = empty_state(model, len(latents))
    for i in range(latents.shape[1]):
        action = None if actions is None or i == 0 else actions[:, i - 1]
        _, state = _advance(model, state, action)
        _, decoder = model.autoencoder.decode(latents[:, i : i + 1], state.decoder)
        state = dataclasses.replace(state, latent=latents[:, i], decoder=tuple(decoder))
    return state


@torch.inference_mode()
def step(
    model: CanvasMAR,
    sampling: SamplingConfig,
    state: State,
    noise: FrameNoise,
    action: Tensor | None = None,
) -> tuple[State, Sample]:
    """Draw the next latent frame and decode it."""
    from_nothing = state.time == 0
    z_temporal, state = _advance(model, state, action)

    canvas = staticness = None
    z_canvas = model.spatial.mask.expand(*noise.canvas.shape)
    if model.canvas is not None and not from_nothing:
        r, r2 = sampling.frame_noise, sampling.canvas_noise
        noised = state.latent * (1 - r) + noise.frame * r
        z_canvas, canvas, staticness = model.canvas(z_temporal, noised)
        z_canvas = (z_canvas * (1 - r2) + noise.canvas * r2).to(z_temporal.dtype)

    order_np = np.empty(noise.flow.shape[:2], np.int64)
    generation_order(
        None if staticness is None else staticness.cpu().numpy(),
        noise.order.cpu().numpy(),
        sampling,
        order_np,
    )
    order = torch.from_numpy(order_np).to(state.latent.device)

    branches = guidance_branches(sampling, has_canvas=canvas is not None)
    plan = flow_plan(sampling)
    temporal_on, canvas_on, weight = (
        torch.from_numpy(x).to(order.device)
        for x in (branches.temporal_on, branches.canvas_on, branches.weight)
    )
    times = model.flow.embed_time(torch.from_numpy(plan.time).to(order.device))
    condition = model.condition_tokens(z_temporal, temporal_on).flatten(0, 1)
    mask = model.mask_tokens(z_canvas, canvas_on).flatten(0, 1)
    cached = model.spatial.condition_keys_values(condition) if model.spatial.isolated else condition
    rows = len(weight)

    latent = torch.zeros_like(noise.flow)
    known = 0
    for size in set_sizes(model.config.tokens, sampling.ar_steps):
        drawn, rest = order[:, :known], order[:, known:]
        chosen = rest[:, :size]
        z = model.spatial(
            cached,
            mask,
            rest.repeat(rows, 1),
            size,
            gather_tokens(latent, drawn).repeat(rows, 1, 1) if known else None,
            drawn.repeat(rows, 1) if known else None,
        ).unflatten(0, (rows, -1))
        embedded = model.flow.embed_condition(z)
        x = gather_tokens(noise.flow, chosen)
        velocity = torch.zeros_like(x)
        for e in range(len(plan.time)):
            last = velocity
            v = model.flow.velocity(x, times[e], embedded)
            velocity = (weight[:, None, None, None] * v).sum(0)
            x = x + float(plan.step_new[e]) * velocity
            if plan.step_old[e]:
                x = x + float(plan.step_old[e]) * last
        latent = put_tokens(latent, chosen, x)
        known += size

    frames, decoder = model.autoencoder.decode(latent[:, None], state.decoder)
    state = dataclasses.replace(state, latent=latent, decoder=tuple(decoder))
    sample = Sample(frames=frames, latent=latent, canvas=canvas, staticness=staticness, order=order)
    return state, sample
