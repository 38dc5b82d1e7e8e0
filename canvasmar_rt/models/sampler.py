"""The reference sampler: plain PyTorch, a pure function of (state, noise, action).

It is the oracle for every engine. It calls the model's modules directly, in the order the paper
describes, and shares nothing with the runtime but the noise, the set sizes and the order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from canvasmar_rt.components import MASKED, autoencoder_states
from canvasmar_rt.config import ModelConfig, SamplingConfig
from canvasmar_rt.models.autoencoder import first_frame_group
from canvasmar_rt.models.canvasmar import CanvasMAR, FrameModel, gather_tokens, put_tokens
from canvasmar_rt.models.unified import UnifiedMAR
from canvasmar_rt.noise import Purpose, fill_gumbel, fill_normal
from canvasmar_rt.schedule import (
    flow_plan,
    flow_temperature,
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

    flow: Tensor  # (B, [J,] N, C)
    frame: Tensor  # (B, N, C), eq. 11
    canvas: Tensor  # (B, [J,] N, D), eq. 12
    order: Tensor  # (B, [J,] K, N), Gumbel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One predicted latent frame: frames uint8 (B, t, H, W, 3), latent and canvas (B, N, C),
    staticness (B, N), order (B, N); of a group frames (B, J*t, ...) and the others (B, J, ...).
    Canvas and staticness are None without a canvas. The first frame of a video made from nothing
    stands for the last of its t decoded frames."""

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

    def normal(purpose: Purpose, level: float, *shape: int) -> Tensor:
        out = np.empty(shape, np.float32)
        fill_normal(out, seed=seed, streams=streams, frame=frame, purpose=purpose, level=level)
        return torch.from_numpy(out)

    group = config.group_shape
    gumbel = np.empty((b, *group, sampling.ar_steps, n), np.float32)
    fill_gumbel(gumbel, seed=seed, streams=streams, frame=frame, purpose=Purpose.ORDER)
    return FrameNoise(
        flow=flow_temperature(sampling, frame) * normal(Purpose.FLOW, 1.0, b, *group, n, c),
        frame=normal(Purpose.FRAME_AUGMENTATION, sampling.frame_noise, b, n, c),
        canvas=normal(Purpose.CANVAS_AUGMENTATION, sampling.canvas_noise, b, *group, n, config.dim),
        order=torch.from_numpy(gumbel),
    )


def empty_state(model: FrameModel, batch: int) -> State:
    """The state before any frame: the next step reads the BOS embedding."""
    c, ae = model.config, model.config.autoencoder
    like = model.flow.out.weight
    cache = like.new_zeros(c.context_frames, batch, c.temporal_tokens, c.dim)
    shapes = autoencoder_states(ae, decoder=True)
    return State(
        latent=like.new_zeros(batch, c.tokens, ae.latent_channels, dtype=torch.float32),
        time=0,
        caches=tuple(cache.clone() for _ in range(2 * c.temporal_layers)),
        decoder=tuple(like.new_zeros(batch, *s) for s in shapes),
    )


@torch.inference_mode()
def encode(model: FrameModel, frames: Tensor) -> Tensor:
    """Clip uint8 (B, 1+n*t, H, W, 3) -> latents (B, 1+n, N, C)."""
    ae = model.config.autoencoder
    like = model.flow.out.weight
    states = [like.new_zeros(len(frames), *s) for s in autoencoder_states(ae, decoder=False)]
    latents, _ = model.autoencoder.encode(
        first_frame_group(frames, ae.temporal_compression), states
    )
    return latents


def _advance(model: FrameModel, state: State, action: Tensor | None) -> tuple[Tensor, State]:
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
def start(model: FrameModel, latents: Tensor, actions: Tensor | None = None) -> State:
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
    model: FrameModel,
    sampling: SamplingConfig,
    state: State,
    noise: FrameNoise,
    action: Tensor | None = None,
) -> tuple[State, Sample]:
    """Draw the next latent frame, or group of them, and decode it. All frames of a group but the
    last are fed to the Temporal ViT at once."""
    from_nothing = state.time == 0
    z_temporal, state = _advance(model, state, action)

    canvas = staticness = None
    z_canvas = z_temporal.new_zeros(noise.canvas.shape)  # is not looked at without a canvas
    if model.canvas is not None and not from_nothing:
        r, r2 = sampling.frame_noise, sampling.canvas_noise
        noised = state.latent * (1 - r) + noise.frame * r
        z_canvas, canvas, staticness = model.canvas(z_temporal, noised, state.latent)
        z_canvas = (z_canvas * (1 - r2) + noise.canvas * r2).to(z_temporal.dtype)

    order_np = np.empty(noise.flow.shape[:-1], np.int64)
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
    if isinstance(model, UnifiedMAR):
        embed = _unified(model, state, temporal_on)
    else:
        assert isinstance(model, CanvasMAR)
        embed = _canvasmar(model, z_temporal, z_canvas, temporal_on, canvas_on)

    # from here to the decoder the frames of a group are rows of the batch
    flow, order = _rows(noise.flow, 2), _rows(order, 1)
    latent = torch.zeros_like(flow)
    if model.config.residual:
        latent = state.latent.repeat_interleave(model.config.group, dim=0)
    known = 0
    for size in set_sizes(model.config.tokens, sampling.ar_steps):
        drawn, rest = order[:, :known], order[:, known:]
        chosen = rest[:, :size]
        z = embed(latent, drawn, rest, size)
        embedded = model.flow.embed_condition(z)
        x = gather_tokens(flow, chosen)
        velocity = torch.zeros_like(x)
        for e in range(len(plan.time)):
            last = velocity
            v = model.flow.velocity(x, times[e], embedded)
            velocity = (weight[:, None, None, None] * v).sum(0)
            x = x + float(plan.step_new[e]) * velocity
            if plan.step_old[e]:
                x = x + float(plan.step_old[e]) * last
        latent = put_tokens(latent, chosen, x, add=model.config.residual)
        known += size

    latents = latent.unflatten(0, (len(state.latent), -1))  # (B, J, N, C)
    frames, decoder = model.autoencoder.decode(latents, state.decoder)
    state = dataclasses.replace(state, decoder=tuple(decoder))
    for inner in latents[:, :-1].unbind(1):
        _, state = _advance(model, dataclasses.replace(state, latent=inner), None)
    state = dataclasses.replace(state, latent=latents[:, -1])
    sample = Sample(
        frames=frames,
        latent=latent.view_as(noise.flow),
        canvas=canvas,
        staticness=staticness,
        order=order.view(noise.flow.shape[:-1]),
    )
    return state, sample


def _rows(x: Tensor, rest: int) -> Tensor:
    """x with all axes but the last `rest` made one."""
    return x.reshape(-1, *x.shape[-rest:])


Embed = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""(latent (R, N, C), drawn (R, n), rest (R, N-n), size) -> z (G, R, size, D) of the first `size` of
the rest, given the tokens drawn so far."""


def _canvasmar(
    model: CanvasMAR, z_temporal: Tensor, z_canvas: Tensor, temporal_on: Tensor, canvas_on: Tensor
) -> Embed:
    condition = model.condition_tokens(z_temporal, temporal_on).flatten(0, 1)
    mask = model.mask_tokens(_rows(z_canvas, 2), canvas_on).flatten(0, 1)
    cached = model.spatial.read_condition(condition)
    rows = len(temporal_on)

    def embed(latent: Tensor, drawn: Tensor, rest: Tensor, size: int) -> Tensor:
        known = drawn.shape[1] > 0
        z: Tensor = model.spatial(
            cached,
            mask,
            rest.repeat(rows, 1),
            size,
            gather_tokens(latent, drawn).repeat(rows, 1, 1) if known else None,
            drawn.repeat(rows, 1) if known else None,
        )
        return z.unflatten(0, (rows, -1))

    return embed


def _unified(model: UnifiedMAR, state: State, temporal_on: Tensor) -> Embed:
    c, device = model.config, temporal_on.device
    bias = torch.where(torch.arange(c.context_frames) < state.time, 0.0, MASKED)
    bias = bias.expand(len(state.latent), -1).to(device)
    time = torch.from_numpy(time_rotation(state.time, c.time_rotary_pairs)).to(device)

    def embed(latent: Tensor, drawn: Tensor, rest: Tensor, size: int) -> Tensor:
        tokens = gather_tokens(latent, drawn) if drawn.shape[1] else None
        x = model.temporal.draw_tokens(len(latent), tokens, drawn)
        return model.temporal.draw(x, rest[:, :size], temporal_on, time, bias, state.caches)

    return embed
