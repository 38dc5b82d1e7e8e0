"""The losses of both stages, as modules that a data-parallel engine can wrap.

All randomness comes from `Draws`, keyed by (seed, step): every rank draws for the clips of all
and keeps its own, so two ranks compute what one computes with the doubled batch, and a resumed run
repeats the interrupted one.

Shapes: B clips, T latent frames, N tokens, C channels, P temporal tokens, D model width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from canvasmar_rt.components import autoencoder_states
from canvasmar_rt.config import ModelConfig
from canvasmar_rt.errors import ConfigError
from canvasmar_rt.models.autoencoder import Autoencoder, ResBlock, first_frame_group
from canvasmar_rt.models.canvasmar import CanvasMAR, FlowHead, FrameModel, gather_tokens
from canvasmar_rt.models.unified import UnifiedMAR
from canvasmar_rt.schedule import time_rotation
from training.config import AutoencoderTraining, ModelTraining

Terms = dict[str, Tensor]

OWN_FLOW_STEPS = 3
"""Euler steps of the predictions that `own_history` trains on."""

MASK_RATIO = "mask ratio"
"""What most shared numbers decide."""


class Draws:
    """Random numbers of one training step. `batch` counts the clips of all ranks and `rows` are
    this rank's among them: every rank draws for all and keeps its own, so a step costs a few
    launches however many clips it has."""

    def __init__(
        self, device: torch.device, *, seed: int, step: int, batch: int, rows: range | None = None
    ) -> None:
        def generator(device: torch.device | str, key: int) -> torch.Generator:
            state = int(np.random.SeedSequence((seed, step, key)).generate_state(1, np.uint64)[0])
            return torch.Generator(device).manual_seed(state >> 1)

        self.device, self.step, self.batch = device, step, batch
        self._rows = slice(None) if rows is None else slice(rows.start, rows.stop)
        self._shared = generator("cpu", 0)  # no rank waits for its GPU to know them
        self._clips = generator(device, 1)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers (B, *shape)."""
        whole = torch.randn((self.batch, *shape), generator=self._clips, device=self.device)
        return whole[self._rows]

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1) (B, *shape)."""
        whole = torch.rand((self.batch, *shape), generator=self._clips, device=self.device)
        return whole[self._rows]

    def shared_uniform(self, what: str = MASK_RATIO) -> float:
        """One uniform number, the same for every clip of the step; what it decides does not matter
        to it here."""
        del what
        return float(torch.rand((), generator=self._shared))


def mask_ratio(uniform: float, *, low: float, std: float) -> float:
    """MAR's mask ratio: normal with mean 1 and standard deviation `std`, cut to [low, 1]; the
    quantile function at `uniform` in [0, 1)."""
    below = 0.5 * (1 + math.erf((low - 1) / (std * math.sqrt(2))))
    quantile = below + uniform * (0.5 - below)
    ratio = 1 + std * math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * quantile - 1)))
    return min(max(ratio, low), 1.0)


def _gradient_l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of the spatial differences of pictures (..., H, W, 3)."""
    error = a - b
    return (error.diff(dim=-3).abs().mean() + error.diff(dim=-2).abs().mean()) / 2


class AutoencoderLoss(nn.Module):
    """L1 + `gradient_weight` * L1 of spatial differences + `kl_weight` * KL, of whole clips."""

    def __init__(self, autoencoder: Autoencoder, config: AutoencoderTraining) -> None:
        super().__init__()
        self.autoencoder, self.config = autoencoder, config

    def forward(self, frames: Tensor, draws: Draws) -> tuple[Tensor, Terms]:
        """uint8 clips (B, 1+n*t, H, W, 3) -> the loss and its terms."""
        ae = self.autoencoder
        grouped = first_frame_group(frames, ae.config.temporal_compression)
        target = grouped.float() / 127.5 - 1.0
        states = [
            target.new_zeros(len(frames), *s) for s in autoencoder_states(ae.config, decoder=False)
        ]
        mean, logvar, _ = ae.encoder(target, states)
        noise = draws.normal(*mean.shape[1:])
        latents = mean + (0.5 * logvar).exp() * noise
        states = [
            target.new_zeros(len(frames), *s) for s in autoencoder_states(ae.config, decoder=True)
        ]
        output, _ = ae.decoder(latents, states)
        l1 = (output - target).abs().mean()
        gradient = _gradient_l1(output, target)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum((2, 3, 4)).mean()
        c = self.config
        total = l1 + c.gradient_weight * gradient + c.kl_weight * kl
        mse = ((output.detach().clamp(-1, 1) - target) ** 2).mean()
        psnr = -10 * torch.log10(mse / 4)  # the data range is 2
        return total, {"l1": l1, "gradient": gradient, "kl": kl, "psnr": psnr}


def open_skips(autoencoder: Autoencoder) -> None:
    """Start with residual blocks that add nothing: the autoencoder begins as a linear one."""
    for module in autoencoder.modules():
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.conv2.weight)


def zero_outputs(model: FrameModel) -> None:
    """Start the flow head at velocity 0 with closed gates (adaLN-zero), as MAR's does."""
    flow = model.flow
    layers = [flow.modulation, flow.out]
    if flow.config.modulation == "additive":
        layers.append(flow.time_modulation)
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)


class CanvasMarLoss(nn.Module):
    """L_MAR + 0.1 L_canvas + 0.1 L_static (eq. 10) over all frames of a clip at once."""

    def __init__(self, model: CanvasMAR, config: ModelTraining) -> None:
        super().__init__()
        self.temporal, self.canvas = model.temporal, model.canvas
        self.spatial, self.flow = model.spatial, model.flow
        self.model_config, self.config = model.config, config
        if not config.mar_weight:
            for part in (self.spatial, self.flow):
                part.requires_grad_(False)

    def forward(
        self,
        latents: Tensor,
        actions: Tensor | None,
        draws: Draws,
        history: Tensor | None = None,
    ) -> tuple[Tensor, Terms]:
        """Normalised latents (B, T, N, C) and actions (B, T-1, A/J) -> the loss and its terms.

        Every frame is predicted, frame by frame or, by a model that draws groups of J, in groups
        that begin at a frame drawn for the step; from `history` (B, T, N, C) where that is not the
        clips themselves."""
        c, group = self.config, self.model_config.group
        batch, frames, tokens = latents.shape[:3]
        history = latents if history is None else history
        begin = int(draws.shared_uniform("begin") * group) if group > 1 else 0
        count = (frames - begin) // group
        starts = torch.arange(begin, begin + count * group, group, device=latents.device)
        groups = latents[:, begin : begin + count * group].reshape(batch, count, group, tokens, -1)
        target = groups.flatten(0, 2)  # (B*M*J, N, C) of M groups a clip
        drop = draws.uniform(count).flatten()[:, None, None]
        canvas_on = (drop >= c.canvas_drop + c.both_drop).float()
        temporal_on = (
            (drop >= c.canvas_drop + c.both_drop + c.temporal_drop) | (drop < c.canvas_drop)
        ).float()

        z_temporal = self._temporal(history, actions, starts, draws).flatten(0, 1)  # (B*M, P, D)
        canvas_terms: Terms = {}
        z_canvas = torch.zeros_like(z_temporal[:1, :1])
        if self.canvas is None:
            canvas_on = torch.zeros_like(canvas_on)
        else:
            z_canvas, canvas_terms = self._canvas(history, groups, starts, z_temporal, draws, begin)
            canvas_on = canvas_on * (starts > 0).float().repeat(batch)[:, None, None]  # not at BOS
        weights = {"canvas": c.canvas_weight, "static": c.static_weight}
        guess = sum(weights[name] * term for name, term in canvas_terms.items())
        if not c.mar_weight:
            assert isinstance(guess, Tensor)
            return guess, canvas_terms
        condition = temporal_on * z_temporal + (1 - temporal_on) * self.spatial.no_temporal
        canvas_on = canvas_on.repeat_interleave(group, dim=0)
        mask_tokens = canvas_on * z_canvas + (1 - canvas_on) * self.spatial.mask
        mask_tokens = mask_tokens.expand(-1, tokens, -1)

        hidden, known = hidden_tokens(draws, count * group, tokens, c)
        masked = hidden.shape[1]
        some = masked < tokens
        z = self.spatial(
            self.spatial.read_condition(condition),
            mask_tokens,
            hidden,
            masked,
            gather_tokens(target, known) if some else None,
            known if some else None,
        )
        if self.model_config.residual:
            target = target - latest(history, starts).repeat_interleave(group, dim=0)
        mar = flow_loss(self.flow, z, gather_tokens(target, hidden), draws, batch, c)
        return c.mar_weight * mar + guess, {"mar": mar, **canvas_terms}

    @torch.no_grad()
    def predicted(self, history: Tensor, actions: Tensor | None, draws: Draws) -> Tensor:
        """Clips (B, T, N, C) with every frame but the first drawn from those before it, all of them
        at once: in one AR step, by `OWN_FLOW_STEPS` of Euler, without guidance, under all
        actions."""
        quiet = dataclasses.replace(self.config, action_drop=0.0, history_noise=0.0)
        frames, tokens = history.shape[1:3]
        starts = torch.arange(frames, device=history.device)
        z_temporal = self._temporal(history, actions, starts, draws, quiet).flatten(0, 1)
        if self.canvas is None:
            mask_tokens = self.spatial.mask.expand(len(z_temporal), tokens, -1)
        else:
            groups = history[:, :, None]
            mask_tokens, _ = self._canvas(history, groups, starts, z_temporal, draws)
        every = torch.arange(tokens, device=history.device).expand(len(z_temporal), -1)
        z = self.spatial(self.spatial.read_condition(z_temporal), mask_tokens, every, tokens)
        embedded = self.flow.embed_condition(z)
        times = torch.arange(OWN_FLOW_STEPS, device=history.device) / OWN_FLOW_STEPS
        x = draws.normal(*history.shape[1:]).flatten(0, 1)
        for time in self.flow.embed_time(times):
            x = x + self.flow.velocity(x, time, embedded) / OWN_FLOW_STEPS
        if self.model_config.residual:
            x = x + latest(history, starts)
        return torch.cat([history[:, :1], x.view_as(history)[:, 1:]], dim=1)

    def _temporal(
        self,
        latents: Tensor,
        actions: Tensor | None,
        starts: Tensor,
        draws: Draws,
        config: ModelTraining | None = None,
    ) -> Tensor:
        """z_t (B, M, P, D) for the frames `starts` (M,)."""
        read, first, moved, given = told_history(
            self.model_config, config or self.config, latents, actions, draws, starts
        )
        times = rotations(self.model_config, range(latents.shape[1]), latents.device)
        z_temporal: Tensor = self.temporal(read, first, moved, given, times)
        return z_temporal[:, starts]

    def _canvas(
        self,
        latents: Tensor,
        groups: Tensor,
        starts: Tensor,
        z_temporal: Tensor,
        draws: Draws,
        begin: int = 0,
    ) -> tuple[Tensor, Terms]:
        """Canvas tokens with eq. 12's noise (B*M*J, N, D), and the losses of eqs. 5 and 7 over the
        groups (B, M, J, N, C), from frame `begin` on, that have a frame before them: means over
        tokens and channels where the paper writes sums, as L_MAR is one. The staticness target
        keeps eq. 6's sum over channels, which the confidence temperature of 6.5 goes with."""
        assert self.canvas is not None
        c, count = self.config, len(starts)
        read = latents[:, (starts - 1).clamp(min=0)]  # the one before the first is not used
        low, high = c.frame_noise
        r = (low + (high - low) * draws.uniform(count))[..., None, None]
        noised = read * (1 - r) + draws.normal(*read.shape[1:]) * r
        z_canvas, canvas, staticness = self.canvas(
            z_temporal, noised.flatten(0, 1), read.flatten(0, 1)
        )
        led = slice(0 if begin else 1, None)  # no look at `starts`, for which a GPU would be waited
        after = (canvas.view_as(groups) - groups)[:, led]
        error = (after**2).sum(-1)  # (B, <=M, J, N), eq. 6
        still = staticness.view(groups.shape[:-1])[:, led]
        static = ((still - torch.exp(-error.detach())) ** 2).mean()
        z_canvas = z_canvas.reshape(-1, *z_canvas.shape[-2:])
        low, high = c.canvas_noise
        r2 = (low + (high - low) * draws.uniform(count)).flatten()[:, None, None]
        r2 = r2.repeat_interleave(self.model_config.group, dim=0)
        frames = count * self.model_config.group
        noise = draws.normal(frames, *z_canvas.shape[1:]).flatten(0, 1)
        z_canvas = z_canvas * (1 - r2) + noise * r2
        return z_canvas, {"canvas": (after**2).mean(), "static": static}


class UnifiedLoss(nn.Module):
    """L_MAR of a unified model, `ModelTraining.teacher` saying what its masked frames see."""

    def __init__(self, model: UnifiedMAR, config: ModelTraining) -> None:
        """
        Raises:
            ConfigError: dynamic intervals for a model with actions, which belong to an interval.
        """
        super().__init__()
        if config.frame_intervals > 1 and model.config.action_dim:
            raise ConfigError("training: frame_intervals need a model without actions")
        self.temporal, self.flow = model.temporal, model.flow
        self.model_config, self.config = model.config, config

    def forward(
        self, latents: Tensor, actions: Tensor | None, draws: Draws
    ) -> tuple[Tensor, Terms]:
        """Normalised latents (B, T, N, C) and actions (B, T-1, A) -> the loss and its terms."""
        c = self.config
        length, interval = self._window(latents.shape[1], draws)
        latents = latents[:, ::interval][:, :length]
        actions = None if actions is None else actions[:, : length - 1]
        batch, frames, tokens = latents.shape[:3]
        drawn_frames = torch.arange(frames, device=latents.device)
        if c.teacher == "next-frame":
            drawn_frames = drawn_frames[-1:]
        count = len(drawn_frames)
        target = latents[:, drawn_frames].flatten(0, 1)  # (B*M, N, C)
        off = c.temporal_drop + c.both_drop
        temporal_on = (draws.uniform(count) >= off).float()

        read, first, moved, given = told_history(self.model_config, c, latents, actions, draws)
        hidden, known = hidden_tokens(draws, count, tokens, c)
        masked = None  # (B, T, N, 1), 1 for the tokens of `read` that are
        if c.teacher == "mtf":
            drawn_masked = torch.zeros(batch * count, tokens, 1, device=latents.device)
            drawn_masked = drawn_masked.scatter(1, hidden[..., None], 1.0)
            drawn_masked = drawn_masked.view(batch, count, tokens, 1)
            none = torch.zeros_like(drawn_masked[:, :1])
            masked = torch.cat([none, drawn_masked[:, :-1]], dim=1)
            read = read * (1 - masked)  # whose embedding is the bias
        history = self.temporal.embed_frames(read, first, moved, given)  # (B, T, N, D)
        if masked is not None:
            history = history + masked * (self.temporal.mask - self.temporal.embed.bias)
        drawn = self.temporal.draw_tokens(batch * count, gather_tokens(target, known), known)
        times = range(0, (frames + 1) * interval, interval)
        z = self.temporal.teach(
            history,
            drawn.view(batch, count, tokens, -1),
            rotations(self.model_config, times, latents.device),
            drawn_frames,
            temporal_on,
        )
        z = gather_tokens(z.flatten(0, 1), hidden)
        if self.model_config.residual:
            target = target - latest(latents, drawn_frames)
        mar = flow_loss(self.flow, z, gather_tokens(target, hidden), draws, batch, c)
        return mar, {"mar": mar}

    def _window(self, frames: int, draws: Draws) -> tuple[int, int]:
        """Latent frames of this step's clips, and their interval."""
        c = self.config
        interval = 1 + int(draws.shared_uniform("interval") * c.frame_intervals)
        length = -(-frames // interval)
        if c.lengths:
            stage = min(draws.step * len(c.lengths) // c.steps, len(c.lengths) - 1)
            length = min(length, c.lengths[stage])
        if c.teacher == "next-frame":  # every length of history is met
            length = 1 + int(draws.shared_uniform("length") * length)
        return length, interval


def model_loss(model: FrameModel, config: ModelTraining) -> CanvasMarLoss | UnifiedLoss:
    """The loss of the second stage.

    Raises:
        ConfigError: options that this model's loss does not have.
    """
    if isinstance(model, UnifiedMAR):
        for field, wanted in (("own_history", 0), ("mar_weight", 1.0)):
            if getattr(config, field) != wanted:
                raise ConfigError(f"training: {field} is no option of unified models")
        return UnifiedLoss(model, config)
    if not (config.mar_weight or model.config.canvas):
        raise ConfigError("training: without L_MAR (mar_weight 0) a model needs a canvas to learn")
    for field in ("teacher", "frame_intervals", "lengths"):
        if getattr(config, field) != ModelTraining.__dataclass_fields__[field].default:
            raise ConfigError(f"training: {field} is an option of unified models alone")
    assert isinstance(model, CanvasMAR)
    if config.own_history and model.config.group > 1:
        raise ConfigError("training: own_history is an option of models that draw frame by frame")
    return CanvasMarLoss(model, config)


# -- what the losses share


def latest(history: Tensor, starts: Tensor) -> Tensor:
    """The frame before each of `starts` (M,) in clips (B, T, N, C), zeros before the first:
    (B*M, N, C)."""
    before = history[:, (starts - 1).clamp(min=0)]
    return (before * (starts > 0)[:, None, None]).flatten(0, 1)


def hidden_tokens(
    draws: Draws, frames: int, tokens: int, config: ModelTraining
) -> tuple[Tensor, Tensor]:
    """Positions of every frame that are masked (B*frames, M) and those that are known; M is drawn
    once for the step."""
    c = config
    ratio = mask_ratio(draws.shared_uniform(), low=c.mask_ratio_min, std=c.mask_ratio_std)
    if c.mask_all and draws.shared_uniform("mask all") < c.mask_all:
        ratio = 1.0
    masked = max(1, math.ceil(ratio * tokens))
    order = draws.uniform(frames, tokens).flatten(0, 1).argsort(dim=1)
    return order[:, :masked], order[:, masked:]


def told_history(
    model: ModelConfig,
    config: ModelTraining,
    latents: Tensor,
    actions: Tensor | None,
    draws: Draws,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """What is told at times 0..T-1 of clips (B, T, N, C): the frame before (noised), whether it is
    the first (B, T), and of a model with actions the actions that follow (B, T, A) and whether they
    are given (B, T), which in a model that draws groups they are at `starts` (M,) alone."""
    batch, frames = latents.shape[:2]
    first = torch.zeros(batch, frames, device=latents.device)
    first[:, 0] = 1
    history = latents
    if config.history_noise:
        level = config.history_noise * draws.uniform(frames)[..., None, None]
        history = latents + level * draws.normal(*latents.shape[1:])
    read = torch.cat([torch.zeros_like(history[:, :1]), history[:, :-1]], dim=1)
    if not model.action_dim:
        return read, first, None, None
    chance = draws.uniform(frames + 1)
    one = (chance[:, 1:] >= config.action_drop / 2).float()
    given = one * (chance[:, :1] >= config.action_drop / 2).float()
    given = given * (1 - first)  # no action leads to the first frame
    if starts is not None:
        begins = torch.zeros_like(first).index_fill(1, starts, 1.0)
        given = given * begins
    one_action = model.action_dim // model.group
    if actions is None:
        actions = latents.new_zeros(batch, frames - 1, one_action)
        given = torch.zeros_like(given)
    # the action from frame i-1 to i comes with frame i-1, and those of its group with it
    before = latents.new_zeros(batch, 1, one_action)
    after = latents.new_zeros(batch, model.group - 1, one_action)
    led = torch.cat([before, actions, after], dim=1)
    moved = torch.cat([led[:, j : j + frames] for j in range(model.group)], dim=-1)
    return read, first, moved, given


def rotations(model: ModelConfig, times: Iterable[int], device: torch.device) -> Tensor:
    """Rotary angles (T, 2, pairs) of latent times."""
    return _rotations(model.time_rotary_pairs, tuple(times), device)


@cache
def _rotations(pairs: int, times: tuple[int, ...], device: torch.device) -> Tensor:
    """Copied to a GPU once: it would be waited for at every step."""
    with torch.inference_mode(False):
        return torch.from_numpy(np.stack([time_rotation(i, pairs) for i in times])).to(device)


def flow_loss(
    flow: FlowHead, z: Tensor, target: Tensor, draws: Draws, batch: int, config: ModelTraining
) -> Tensor:
    """Flow-matching loss of tokens (R, M, C) given z (R, M, D), R = B*T (eq. 4)."""
    repeat, frames = config.flow_repeat, len(z) // batch
    shape = (repeat, frames, *target.shape[1:])
    noise = draws.normal(*shape).transpose(0, 1).flatten(1, 2)  # (repeat, R, M, C)
    times = shape[:-1] if config.flow_time_of == "token" else (repeat, frames, 1)
    if config.flow_time == "uniform":
        time = draws.uniform(*times)
    else:
        time = draws.normal(*times).sigmoid()
    time = time.transpose(0, 1).flatten(1, 2)[..., None]
    x = (1 - time) * noise + time * target
    embedded = flow.embed_time(time.flatten()).reshape(*time.shape[:-1], -1)
    velocity = flow.velocity(x, embedded, flow.embed_condition(z))
    return ((velocity - (target - noise)) ** 2).mean()
