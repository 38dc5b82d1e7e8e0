"""Causal video autoencoder that runs one latent frame at a time.

Temporal compression is {1, t}: the first latent frame stands for the first pixel frame alone (fed
as t copies of itself), every later one for t pixel frames. The t frames of a group and patches of
`patch` pixels enter as channels, so every layer runs at the latent frame rate; causal convolutions
look back `kernel - 1` latent frames, and that history is an explicit state. One code path
serves a whole clip and a stream.

Shapes: B batch, T latent frames, t pixel frames per latent frame, C channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from canvasmar_rt.config import AutoencoderConfig
from canvasmar_rt.models.layers import LayerNorm, init_weights


class ChannelNorm(nn.Module):
    """Layer norm over the channels of every position, (R, C, h, w), in float32."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class CausalConv(nn.Module):
    """A 3D convolution (kt x 3 x 3), causal in time: kt frames enter one 2D convolution as
    channels, oldest first, or a clip enters a 3D one with the same weights. Its state is the last
    kt-1 input frames (B, kt-1, C, h, w)."""

    def __init__(self, channels: int, out: int, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.conv = nn.Conv2d(kernel * channels, out, 3, padding=1)

    def forward(self, x: Tensor, states: Iterator[Tensor], new: list[Tensor]) -> Tensor:
        """x (B, T, C, h, w) -> (B, T, out, h, w); takes its state from `states` and appends the
        next one to `new`."""
        frames = x.shape[1]
        if frames == 1:
            if self.kernel > 1:
                x = torch.cat([next(states), x], dim=1)
                new.append(x[:, 1:])
            return self.conv(x.flatten(1, 2)).unflatten(0, (-1, 1))
        x = x.permute(0, 1, 3, 4, 2)  # channels last, as a clip's convolutions leave them: no copy
        if self.kernel > 1:
            x = torch.cat([next(states).permute(0, 1, 3, 4, 2).to(x.dtype), x], dim=1)
            new.append(x[:, frames:].permute(0, 1, 4, 2, 3))
        weight = self.conv.weight.unflatten(1, (self.kernel, -1)).transpose(1, 2)
        out = F.conv3d(x.permute(0, 4, 1, 2, 3), weight, self.conv.bias, padding=(0, 1, 1))
        return out.transpose(1, 2)


class ResBlock(nn.Module):
    """Norm, SiLU, causal conv, norm, SiLU, spatial conv, and the skip."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(channels), ChannelNorm(channels)
        self.conv1 = CausalConv(channels, channels, kernel)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, states: Iterator[Tensor], new: list[Tensor]) -> Tensor:
        frames = x.shape[1]
        h = F.silu(self.norm1(x.flatten(0, 1))).unflatten(0, (-1, frames))
        h = self.conv1(h, states, new).flatten(0, 1)
        h = self.conv2(F.silu(self.norm2(h)))
        return x + h.unflatten(0, (-1, frames))


def _match(x: Tensor, channels: int) -> Tensor:
    """The first `channels` channels of x (R, C, h, w), zeros where there are none."""
    return F.pad(x, (0, 0, 0, 0, 0, channels - x.shape[1]))


class Down(nn.Module):
    """Half the resolution: a strided convolution beside the mean of every 2x2 positions."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.out = out
        self.conv = nn.Conv2d(channels, out, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + _match(F.avg_pool2d(x, 2), self.out)


class Up(nn.Module):
    """Twice the resolution: a convolution to 2x2 positions beside the repeated value."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.out = out
        self.conv = nn.Sequential(nn.Conv2d(channels, 4 * out, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + F.interpolate(_match(x, self.out), scale_factor=2.0)


def _per_frame(module: nn.Module, x: Tensor) -> Tensor:
    return module(x.flatten(0, 1)).unflatten(0, (-1, x.shape[1]))


class Encoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        c, widths, kernel = config, config.widths, config.kernel(decoder=False)
        self.conv_in = CausalConv(3 * c.temporal_compression * c.patch**2, widths[0], kernel)
        self.stages = nn.ModuleList(
            nn.ModuleList(ResBlock(w, kernel) for _ in range(c.blocks)) for w in widths
        )
        self.down = nn.ModuleList(Down(a, b) for a, b in itertools.pairwise(widths))
        self.conv_out = nn.Conv2d(widths[-1], 2 * c.latent_channels, 3, padding=1)

    def forward(
        self, frames: Tensor, states: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Frames (B, T*t, H, W, 3) in -1..1 -> mean and log variance (B, T, C, h, w), states."""
        t = self.config.temporal_compression
        x = frames.unflatten(1, (-1, t)).permute(0, 1, 2, 5, 3, 4).flatten(2, 3)
        x = _per_frame(nn.PixelUnshuffle(self.config.patch), x)
        it = iter(states)
        new: list[Tensor] = []
        x = self.conv_in(x, it, new)
        for i, stage in enumerate(self.stages):
            for block in stage:
                x = block(x, it, new)
            if i < len(self.down):
                x = _per_frame(self.down[i], x)
        x = _per_frame(self.conv_out, x)
        mean, logvar = x.float().chunk(2, dim=2)
        return mean, logvar.clamp(-30.0, 20.0), new


class Decoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        c, widths, kernel = config, config.widths[::-1], config.kernel(decoder=True)
        self.conv_in = CausalConv(c.latent_channels, widths[0], kernel)
        self.stages = nn.ModuleList(
            nn.ModuleList(ResBlock(w, kernel) for _ in range(c.blocks)) for w in widths
        )
        self.up = nn.ModuleList(Up(a, b) for a, b in itertools.pairwise(widths))
        self.conv_out = nn.Conv2d(widths[-1], 3 * c.temporal_compression * c.patch**2, 3, padding=1)

    def forward(self, latents: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Latents (B, T, C, h, w), not normalised -> frames (B, T*t, H, W, 3) float32, states."""
        it = iter(states)
        new: list[Tensor] = []
        x = self.conv_in(latents, it, new)
        for i, stage in enumerate(self.stages):
            for block in stage:
                x = block(x, it, new)
            if i < len(self.up):
                x = _per_frame(self.up[i], x)
        x = _per_frame(self.conv_out, x)
        x = _per_frame(nn.PixelShuffle(self.config.patch), x)  # (B, T, t*3, H, W)
        t = self.config.temporal_compression
        return x.unflatten(2, (t, 3)).permute(0, 1, 2, 4, 5, 3).flatten(1, 2).float(), new


class Autoencoder(nn.Module):
    """Encoder, decoder and the latent statistics (mean, standard deviation per channel)."""

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))
        self.apply(init_weights)

    def encode(self, frames: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """uint8 frames (B, T*t, H, W, 3) -> normalised latents (B, T, N, C) float32, states."""
        x = (frames.to(torch.float32) / 127.5 - 1.0).to(self.encoder.conv_out.weight.dtype)
        mean, _, new = self.encoder(x, states)
        mean = mean.flatten(3).transpose(2, 3)
        return (mean - self.latent_mean.float()) / self.latent_std.float(), new

    def decode(self, latents: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Normalised latents (B, T, N, C) -> uint8 frames (B, T*t, H, W, 3), states."""
        x = latents.float() * self.latent_std.float() + self.latent_mean.float()
        h, w = self.config.latent_height, self.config.latent_width
        x = x.transpose(2, 3).unflatten(3, (h, w)).to(self.decoder.conv_out.weight.dtype)
        frames, new = self.decoder(x, states)
        return ((frames + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8), new


def first_frame_group(frames: Tensor, t: int) -> Tensor:
    """Clip (B, 1+n*t, H, W, 3) with its first frame repeated, (B, (1+n)*t, H, W, 3): what `encode`
    takes for a whole clip."""
    return torch.cat([frames[:, :1].expand(-1, t, -1, -1, -1), frames[:, 1:]], dim=1)
