"""The losses of both stages, as modules that a data-parallel engine can wrap.

All randomness comes from `Draws`, keyed by (seed, step, clip): a clip is noised alike whatever
rank or batch it falls into, so two ranks compute what one computes with the doubled batch, and a
resumed run repeats the interrupted one. What all clips of a step share (the mask ratio) is keyed
by (seed, step).

Shapes: B clips, T latent frames, N tokens, C channels, P temporal tokens, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from canvasmar_rt.components import autoencoder_states
from canvasmar_rt.models.autoencoder import Autoencoder, ResBlock, first_frame_group
from canvasmar_rt.models.canvasmar import CanvasMAR, gather_tokens
from canvasmar_rt.schedule import time_rotation
from training.config import AutoencoderTraining, ModelTraining

Terms = dict[str, Tensor]


class Draws:
    """Random numbers of one training step on one rank, one generator per clip."""

    def __init__(self, device: torch.device, *, seed: int, step: int, clips: Sequence[int]) -> None:
        def generator(*key: int) -> torch.Generator:
            state = int(np.random.SeedSequence((seed, step, *key)).generate_state(1, np.uint64)[0])
            return torch.Generator(device).manual_seed(state >> 1)

        self.device = device
        self._shared = generator(0)
        self._clips = [generator(1, clip) for clip in clips]

    def _each(self, make: Callable[[torch.Generator], Tensor]) -> Tensor:
        return torch.stack([make(g) for g in self._clips])

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers (B, *shape)."""
        return self._each(lambda g: torch.randn(shape, generator=g, device=self.device))

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1) (B, *shape)."""
        return self._each(lambda g: torch.rand(shape, generator=g, device=self.device))

    def shared_uniform(self) -> float:
        """One uniform number, the same for every clip of the step."""
        return float(torch.rand((), generator=self._shared, device=self.device))


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


def zero_outputs(model: CanvasMAR) -> None:
    """Start the flow head at velocity 0 with closed gates (adaLN-zero), as MAR's does."""
    flow = model.flow
    layers = [flow.modulation, flow.out]
    if flow.config.modulation == "additive":
        layers.append(flow.time_modulation)
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)


class ModelLoss(nn.Module):
    """L_MAR + 0.1 L_canvas + 0.1 L_static (eq. 10) over all frames of a clip at once."""

    def __init__(self, model: CanvasMAR, config: ModelTraining) -> None:
        super().__init__()
        self.temporal, self.canvas = model.temporal, model.canvas
        self.spatial, self.flow = model.spatial, model.flow
        self.model_config, self.config = model.config, config

    def forward(
        self, latents: Tensor, actions: Tensor | None, draws: Draws
    ) -> tuple[Tensor, Terms]:
        """Normalised latents (B, T, N, C) and actions (B, T-1, A) -> the loss and its terms."""
        c = self.config
        batch, frames, tokens = latents.shape[:3]
        target = latents.flatten(0, 1)  # (B*T, N, C), every frame is predicted
        drop = draws.uniform(frames).flatten()[:, None, None]
        canvas_on = (drop >= c.canvas_drop + c.both_drop).float()
        temporal_on = (
            (drop >= c.canvas_drop + c.both_drop + c.temporal_drop) | (drop < c.canvas_drop)
        ).float()

        z_temporal = self._temporal(latents, actions, draws).flatten(0, 1)  # (B*T, P, D)
        canvas_terms: Terms = {}
        z_canvas = torch.zeros_like(z_temporal[:, :1])
        if self.canvas is None:
            canvas_on = torch.zeros_like(canvas_on)
        else:
            z_canvas, canvas_terms = self._canvas(latents, z_temporal, draws)
            first = torch.arange(batch * frames, device=latents.device) % frames == 0
            canvas_on = canvas_on * (~first).float()[:, None, None]  # nothing to go on at the BOS
        condition = temporal_on * z_temporal + (1 - temporal_on) * self.spatial.no_temporal
        mask_tokens = canvas_on * z_canvas + (1 - canvas_on) * self.spatial.mask
        mask_tokens = mask_tokens.expand(-1, tokens, -1)

        ratio = mask_ratio(draws.shared_uniform(), low=c.mask_ratio_min, std=c.mask_ratio_std)
        masked = max(1, math.ceil(ratio * tokens))
        order = draws.uniform(frames, tokens).flatten(0, 1).argsort(dim=1)
        hidden, known = order[:, :masked], order[:, masked:]
        some = masked < tokens
        cached = (
            self.spatial.condition_keys_values(condition) if self.spatial.isolated else condition
        )
        z = self.spatial(
            cached,
            mask_tokens,
            hidden,
            masked,
            gather_tokens(target, known) if some else None,
            known if some else None,
        )
        mar = self._flow(z, gather_tokens(target, hidden), draws, batch)
        terms = {"mar": mar, **canvas_terms}
        total = mar
        if canvas_terms:
            total = total + c.canvas_weight * terms["canvas"] + c.static_weight * terms["static"]
        return total, terms

    def _temporal(self, latents: Tensor, actions: Tensor | None, draws: Draws) -> Tensor:
        c = self.config
        batch, frames = latents.shape[:2]
        first = torch.zeros(batch, frames, device=latents.device)
        first[:, 0] = 1
        history = latents
        if c.history_noise:
            level = c.history_noise * draws.uniform(frames)[..., None, None]
            history = latents + level * draws.normal(*latents.shape[1:])
        read = torch.cat([torch.zeros_like(history[:, :1]), history[:, :-1]], dim=1)
        given = moved = None
        if self.model_config.action_dim:
            chance = draws.uniform(frames + 1)
            one = (chance[:, 1:] >= c.action_drop / 2).float()
            given = one * (chance[:, :1] >= c.action_drop / 2).float()
            given = given * (1 - first)  # no action leads to the first frame
            if actions is None:
                actions = latents.new_zeros(batch, frames - 1, self.model_config.action_dim)
                given = torch.zeros_like(given)
            # the action from frame i-1 to i comes with frame i-1
            moved = torch.cat([torch.zeros_like(actions[:, :1]), actions], dim=1)
        times = np.stack(
            [time_rotation(i, self.model_config.time_rotary_pairs) for i in range(frames)]
        )
        rotation = torch.from_numpy(times).to(latents.device)
        z_temporal: Tensor = self.temporal(read, first, moved, given, rotation)
        return z_temporal

    def _canvas(self, latents: Tensor, z_temporal: Tensor, draws: Draws) -> tuple[Tensor, Terms]:
        """Canvas tokens with eq. 12's noise (B*T, N, D), and the losses of eqs. 5 and 7 over the
        frames that have a frame before them: means over tokens and channels where the paper
        writes sums, as L_MAR is one. The staticness target keeps eq. 6's sum over channels, which
        the confidence temperature of 6.5 goes with."""
        assert self.canvas is not None
        c = self.config
        batch, frames = latents.shape[:2]
        read = torch.cat([latents[:, :1], latents[:, :-1]], dim=1)  # the first is not used
        low, high = c.frame_noise
        r = (low + (high - low) * draws.uniform(frames))[..., None, None]
        noised = read * (1 - r) + draws.normal(*read.shape[1:]) * r
        z_canvas, canvas, staticness = self.canvas(z_temporal, noised.flatten(0, 1))
        after = (canvas - latents.flatten(0, 1)).unflatten(0, (batch, frames))[:, 1:]
        error = (after**2).sum(-1)  # (B, T-1, N), eq. 6
        still = staticness.unflatten(0, (batch, frames))[:, 1:]
        static = ((still - torch.exp(-error.detach())) ** 2).mean()
        low, high = c.canvas_noise
        r2 = (low + (high - low) * draws.uniform(frames)).flatten()[:, None, None]
        noise = draws.normal(frames, *z_canvas.shape[1:]).flatten(0, 1)
        z_canvas = z_canvas * (1 - r2) + noise * r2
        return z_canvas, {"canvas": (after**2).mean(), "static": static}

    def _flow(self, z: Tensor, target: Tensor, draws: Draws, batch: int) -> Tensor:
        """Flow-matching loss of tokens (R, M, C) given z (R, M, D), R = B*T (eq. 4)."""
        repeat, frames = self.config.flow_repeat, len(z) // batch
        shape = (repeat, frames, *target.shape[1:])
        noise = draws.normal(*shape).transpose(0, 1).flatten(1, 2)  # (repeat, R, M, C)
        if self.config.flow_time == "uniform":
            time = draws.uniform(*shape[:-1])
        else:
            time = draws.normal(*shape[:-1]).sigmoid()
        time = time.transpose(0, 1).flatten(1, 2)[..., None]
        x = (1 - time) * noise + time * target
        embedded = self.flow.embed_time(time.flatten()).reshape(*time.shape[:-1], -1)
        velocity = self.flow.velocity(x, embedded, self.flow.embed_condition(z))
        return ((velocity - (target - noise)) ** 2).mean()
