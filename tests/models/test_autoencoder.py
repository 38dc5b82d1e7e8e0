"""Causal autoencoder: streams equal whole clips, convolutions equal 3D ones, none looks ahead."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from canvasmar_rt.components import autoencoder_states
from canvasmar_rt.config import AutoencoderConfig
from canvasmar_rt.models.autoencoder import (
    Autoencoder,
    CausalConv,
    ChannelNorm,
    Down,
    Up,
    first_frame_group,
)
from canvasmar_rt.models.families import build
from tests.conftest import least_config

BASE = AutoencoderConfig(
    height=16,
    width=24,
    temporal_compression=2,
    latent_channels=4,
    patch=2,
    widths=(16, 24),
    blocks=1,
    temporal_kernel=3,
)
VARIANTS = {
    "kernel1": dataclasses.replace(BASE, temporal_kernel=1),
    "kernel2": dataclasses.replace(BASE, temporal_kernel=2, blocks=2),
    "kernel3": BASE,
    "kernel1-in-3-out": dataclasses.replace(BASE, encoder_kernel=1),
    "t1": dataclasses.replace(BASE, temporal_compression=1, widths=(16,), patch=4),
    "t4": dataclasses.replace(BASE, temporal_compression=4, patch=1, widths=(8, 16, 16)),
}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(params=VARIANTS)
def ae(request: pytest.FixtureRequest) -> Autoencoder:
    torch.manual_seed(0)
    model = Autoencoder(VARIANTS[request.param]).eval()
    channels = model.config.latent_channels
    model.latent_mean.copy_(torch.linspace(-0.5, 0.5, channels))
    model.latent_std.copy_(torch.linspace(0.5, 2.0, channels))
    return model


def states(ae: Autoencoder, batch: int, *, decoder: bool) -> list[Tensor]:
    return [torch.zeros(batch, *s) for s in autoencoder_states(ae.config, decoder=decoder)]


def clip(ae: Autoencoder, latent_frames: int, batch: int = 2) -> Tensor:
    """Noise of as many pixel frames as make `latent_frames` latent frames."""
    c = ae.config
    frames = 1 + (latent_frames - 1) * c.temporal_compression
    generator = torch.Generator().manual_seed(1)
    shape = (batch, frames, c.height, c.width, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def some_latents(ae: Autoencoder, frames: int, batch: int = 2) -> Tensor:
    c = ae.config
    generator = torch.Generator().manual_seed(2)
    shape = (batch, frames, c.latent_height * c.latent_width, c.latent_channels)
    return torch.randn(shape, generator=generator)


def encode(ae: Autoencoder, frames: Tensor) -> Tensor:
    groups = first_frame_group(frames, ae.config.temporal_compression)
    return ae.encode(groups, states(ae, len(frames), decoder=False))[0]


def raw_decode(ae: Autoencoder, latents: Tensor, history: list[Tensor]) -> tuple[Tensor, list]:
    """The decoder before rounding to uint8: latents (B, T, N, C) not normalised."""
    c = ae.config
    x = latents.transpose(2, 3).unflatten(3, (c.latent_height, c.latent_width))
    return ae.decoder(x, history)


# -- streaming


@pytest.mark.parametrize("frames", [1, 2, 3, 7])
def test_streamed_encoding_equals_the_whole_clip(ae: Autoencoder, frames: int) -> None:
    video, t = clip(ae, frames), ae.config.temporal_compression
    whole = encode(ae, video)
    n = ae.config.latent_height * ae.config.latent_width
    assert whole.shape == (2, frames, n, ae.config.latent_channels)
    assert whole.dtype == torch.float32
    groups = first_frame_group(video, t)
    history, parts = states(ae, 2, decoder=False), []
    for i in range(frames):
        part, history = ae.encode(groups[:, i * t : (i + 1) * t], history)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    assert whole.std() > 0.1


@pytest.mark.parametrize("frames", [1, 2, 3, 7])
def test_streamed_decoding_equals_the_whole_clip(ae: Autoencoder, frames: int) -> None:
    latents = some_latents(ae, frames)
    whole, final = raw_decode(ae, latents, states(ae, 2, decoder=True))
    c = ae.config
    assert whole.shape == (2, frames * c.temporal_compression, c.height, c.width, 3)
    history, parts = states(ae, 2, decoder=True), []
    for i in range(frames):
        part, history = raw_decode(ae, latents[:, i : i + 1], history)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    for a, b in zip(history, final, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_streamed_pixels_equal_the_whole_clip(ae: Autoencoder) -> None:
    latents = some_latents(ae, 5)
    whole, _ = ae.decode(latents, states(ae, 2, decoder=True))
    assert whole.dtype == torch.uint8
    history, parts = states(ae, 2, decoder=True), []
    for i in range(5):
        part, history = ae.decode(latents[:, i : i + 1], history)
        parts.append(part)
    difference = (torch.cat(parts, 1).int() - whole.int()).abs()
    assert difference.max() <= 1  # a value on the edge of rounding
    assert difference.float().mean() < 1e-3


def test_chunks_of_any_length_agree(ae: Autoencoder) -> None:
    video, t = clip(ae, 7), ae.config.temporal_compression
    whole, groups = encode(ae, video), first_frame_group(video, t)
    history, parts, at = states(ae, 2, decoder=False), [], 0
    for length in (1, 3, 1, 2):
        part, history = ae.encode(groups[:, at * t : (at + length) * t], history)
        parts.append(part)
        at += length
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


def test_states_have_the_declared_shapes(ae: Autoencoder) -> None:
    """Exactly as many histories as declared, of the declared shapes, before and after."""
    for decoder in (False, True):
        want = autoencoder_states(ae.config, decoder=decoder)
        assert (want == []) == (ae.config.kernel(decoder=decoder) == 1)
        given = states(ae, 3, decoder=decoder)
        if decoder:
            _, new = ae.decode(some_latents(ae, 1, batch=3), given)
        else:
            t = ae.config.temporal_compression
            _, new = ae.encode(first_frame_group(clip(ae, 1, batch=3), t), given)
        assert [tuple(s.shape[1:]) for s in new] == want
        assert all(s.shape[0] == 3 for s in new)
        convolutions = [
            m
            for m in (ae.decoder if decoder else ae.encoder).modules()
            if isinstance(m, CausalConv) and m.kernel > 1
        ]
        assert len(convolutions) == len(want)


def test_state_shapes_written_out() -> None:
    entry, first, second = (2, 24, 8, 12), (2, 16, 8, 12), (2, 24, 4, 6)
    assert autoencoder_states(BASE, decoder=False) == [entry, first, second]
    assert autoencoder_states(BASE, decoder=True) == [(2, 4, 4, 6), second, first]


def test_states_are_not_changed_in_place(ae: Autoencoder) -> None:
    given = [torch.randn(1, *s) for s in autoencoder_states(ae.config, decoder=True)]
    before = [s.clone() for s in given]
    latents = some_latents(ae, 2, batch=1)
    first, _ = ae.decode(latents, given)
    second, _ = ae.decode(latents, given)
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


# -- convolution


@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_causal_conv_is_a_3d_convolution(kernel: int, frames: int) -> None:
    torch.manual_seed(kernel)
    conv = CausalConv(5, 7, kernel)
    x, past = torch.randn(2, frames, 5, 6, 8), torch.randn(2, kernel - 1, 5, 6, 8)
    new: list[Tensor] = []
    got = conv(x, iter([past]), new)

    weight = conv.conv.weight.new_empty(7, 5, kernel, 3, 3)  # (out, in, time, y, x)
    for time in range(kernel):
        for channel in range(5):
            weight[:, channel, time] = conv.conv.weight[:, time * 5 + channel]
    history = torch.cat([past, x], 1).transpose(1, 2)
    want = F.conv3d(history, weight, conv.conv.bias, padding=(0, 1, 1)).transpose(1, 2)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    if kernel > 1:
        assert torch.equal(new[0], torch.cat([past, x], 1)[:, -(kernel - 1) :])
    else:
        assert new == []


def test_empty_history_is_zero_padding() -> None:
    torch.manual_seed(0)
    conv = CausalConv(3, 4, 3)
    x = torch.randn(1, 4, 3, 6, 6)
    got = conv(x, iter([torch.zeros(1, 2, 3, 6, 6)]), [])
    weight = conv.conv.weight.unflatten(1, (3, 3)).transpose(1, 2)
    padded = F.pad(x.transpose(1, 2), (1, 1, 1, 1, 2, 0))
    want = F.conv3d(padded, weight, conv.conv.bias).transpose(1, 2)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_channel_norm_is_per_position() -> None:
    """Statistics over the channels of one position: the formula in float64."""
    torch.manual_seed(0)
    norm = ChannelNorm(16)
    norm.norm.weight.copy_(torch.randn(16))
    norm.norm.bias.copy_(torch.randn(16))
    x = torch.randn(3, 16, 4, 5) * 3 + 1
    values = x.double().numpy()
    mean, variance = values.mean(1, keepdims=True), values.var(1, keepdims=True)
    want = (values - mean) / np.sqrt(variance + 1e-5)
    weight, bias = norm.norm.weight.numpy(), norm.norm.bias.numpy()
    want = want * weight[:, None, None] + bias[:, None, None]
    torch.testing.assert_close(norm(x).double(), torch.from_numpy(want), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("channels", "out"), [(8, 8), (8, 16), (16, 8)])
def test_resampling_starts_from_the_mean_and_the_repeated_value(channels: int, out: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, channels, 4, 6)
    down, up = Down(channels, out), Up(channels, out)
    for parameter in [*down.conv.parameters(), *up.conv.parameters()]:
        torch.nn.init.zeros_(parameter)
    kept = min(channels, out)
    mean = x.reshape(2, channels, 2, 2, 3, 2).mean((3, 5))
    assert down(x).shape == (2, out, 2, 3)
    torch.testing.assert_close(down(x)[:, :kept], mean[:, :kept])
    assert down(x)[:, kept:].abs().sum() == 0
    assert up(x).shape == (2, out, 8, 12)
    repeated = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(up(x)[:, :kept], repeated[:, :kept])
    assert up(x)[:, kept:].abs().sum() == 0


# -- causality


@pytest.mark.parametrize("changed", [0, 1, 3, 4])
def test_no_latent_frame_sees_later_pixels(ae: Autoencoder, changed: int) -> None:
    video, t = clip(ae, 5, batch=1), ae.config.temporal_compression
    before = encode(ae, video)
    other = video.clone()
    other[:, max(1 + (changed - 1) * t, 0)] ^= 255  # the first pixel frame of that latent frame
    after = encode(ae, other)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert (before[:, changed] - after[:, changed]).abs().max() > 1e-3
    reach = ae.config.kernel(decoder=False) - 1
    if reach and changed + 1 < 5:
        assert (before[:, changed + 1] - after[:, changed + 1]).abs().max() > 1e-5
    if reach == 0:
        assert torch.equal(before[:, changed + 1 :], after[:, changed + 1 :])


@pytest.mark.parametrize("changed", [0, 1, 3, 4])
def test_no_pixel_sees_later_latents(ae: Autoencoder, changed: int) -> None:
    latents, t = some_latents(ae, 5, batch=1), ae.config.temporal_compression
    before, _ = raw_decode(ae, latents, states(ae, 1, decoder=True))
    other = latents.clone()
    other[:, changed] += 1.0
    after, _ = raw_decode(ae, other, states(ae, 1, decoder=True))
    at = changed * t
    assert torch.equal(before[:, :at], after[:, :at])
    difference = (before[:, at : at + t] - after[:, at : at + t]).abs()
    assert difference.amax((2, 3, 4)).min() > 1e-3, "every pixel frame of the group changes"


def test_batch_rows_do_not_mix(ae: Autoencoder) -> None:
    video = clip(ae, 3, batch=3)
    together = encode(ae, video)
    for b in range(3):
        alone = encode(ae, video[b : b + 1])
        torch.testing.assert_close(alone[0], together[b], rtol=1e-5, atol=1e-5)


# -- the first frame, normalisation


def test_the_first_frame_is_a_latent_frame_by_itself(ae: Autoencoder) -> None:
    video, t = clip(ae, 4), ae.config.temporal_compression
    groups = first_frame_group(video, t)
    assert groups.shape[1] == 4 * t
    for i in range(t):
        assert torch.equal(groups[:, i], video[:, 0])
    assert torch.equal(groups[:, t:], video[:, 1:])
    alone, whole = encode(ae, video[:, :1]), encode(ae, video)
    torch.testing.assert_close(alone[:, 0], whole[:, 0], rtol=1e-5, atol=1e-5)
    later = video.clone()
    later[:, 1:] ^= 255
    assert torch.equal(encode(ae, later)[:, 0], whole[:, 0])


def test_latents_are_normalised_by_the_models_statistics(ae: Autoencoder) -> None:
    video = clip(ae, 2)
    pixels = first_frame_group(video, ae.config.temporal_compression).float() / 127.5 - 1
    assert pixels.min() == -1.0
    assert pixels.max() == 1.0
    mean, logvar, _ = ae.encoder(pixels, states(ae, 2, decoder=False))
    assert logvar.shape == mean.shape
    want = (mean.flatten(3).transpose(2, 3) - ae.latent_mean) / ae.latent_std
    torch.testing.assert_close(encode(ae, video), want)

    latents = some_latents(ae, 2)
    raw, _ = raw_decode(ae, latents * ae.latent_std + ae.latent_mean, states(ae, 2, decoder=True))
    pixels = torch.round((raw + 1) / 2 * 255).clamp(0, 255)
    frames, _ = ae.decode(latents, states(ae, 2, decoder=True))
    assert (frames - pixels).abs().max() <= 1
    assert ((frames - pixels).abs() > 0).float().mean() < 1e-3


def test_tokens_are_in_raster_order() -> None:
    """Token y * w + x is the latent at (y, x): a change in a corner of the picture stays there."""
    torch.manual_seed(0)
    ae = Autoencoder(BASE).eval()
    video = clip(ae, 1, batch=1)
    other = video.clone()
    other[:, :, -4:, :4] ^= 255  # bottom left
    # group norm spreads a little everywhere, the corner itself changes most
    change = (encode(ae, video) - encode(ae, other)).norm(dim=-1)[0, 0].view(4, 6)
    y, x = divmod(int(change.argmax()), 6)
    assert y >= 2
    assert x <= 1
    assert change[2:, :3].mean() > 3 * change[:2, 3:].mean()


def test_variances_stay_within_what_float32_exponentiates() -> None:
    from canvasmar_rt.components import autoencoder_states

    config = least_config()
    encoder = build(config).autoencoder.encoder
    frames = torch.zeros(1, 1, 8, 8, 3)
    states = [torch.zeros(1, *s) for s in autoencoder_states(config.autoencoder, decoder=False)]
    for bias, most in ((1e3, 20.0), (-1e3, -30.0)):
        with torch.no_grad():
            encoder.conv_out.bias.fill_(bias)
        assert (encoder(frames, states)[1] == most).all()
