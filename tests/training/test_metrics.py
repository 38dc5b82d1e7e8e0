"""General metrics against closed forms, SciPy and NumPy; the paper's protocols by counting."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import linalg, ndimage
from torch import Tensor, nn

from canvasmar_rt.errors import ConfigError, InputError
from training.metrics import (
    BAIR,
    BAIR_DEBIASED,
    BAIR_DEBIASED_ABLATION,
    I3D,
    KINETICS600,
    KINETICS600_ABLATION,
    PROTOCOLS,
    UCF101,
    GaussianStats,
    Lpips,
    Protocol,
    at_resolution,
    frechet_distance,
    psnr,
    resize_frames,
    run_protocol,
    ssim,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_frames(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=generator(seed))


def covariance(d: int, rank: int, seed: int) -> Tensor:
    factor = torch.randn(d, rank, generator=generator(seed), dtype=torch.float64)
    return factor @ factor.T / rank


def by_scipy(m1: Tensor, c1: Tensor, m2: Tensor, c2: Tensor) -> float:
    root = linalg.sqrtm(c1.numpy() @ c2.numpy()).real
    return float((m1 - m2).square().sum() + (c1 + c2).trace() - 2 * np.trace(root))


# Fréchet distance


def test_frechet_of_commuting_covariances_is_the_closed_form() -> None:
    axes = torch.linalg.qr(torch.randn(12, 12, generator=generator(), dtype=torch.float64))[0]
    a, b = (torch.rand(12, generator=generator(s), dtype=torch.float64) * 3 for s in (1, 2))
    a[:4] = 0  # rank-deficient in part
    m1, m2 = torch.zeros(12), torch.arange(12.0)
    expected = float((m1 - m2).square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    got = frechet_distance(m1, axes * a @ axes.T, m2, axes * b @ axes.T)
    # eigenvalues that are zero are known to 1e-16, and their roots enter
    assert got == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rank", [40, 24])
def test_frechet_agrees_with_scipy(rank: int) -> None:
    d = 24
    m1, m2 = torch.randn(2, d, generator=generator(), dtype=torch.float64)
    c1, c2 = covariance(d, rank, 1), covariance(d, rank, 2)
    assert frechet_distance(m1, c1, m2, c2) == pytest.approx(by_scipy(m1, c1, m2, c2), rel=1e-7)


def test_frechet_of_rank_one_covariances() -> None:
    u, v = torch.randn(2, 30, generator=generator(), dtype=torch.float64)
    zero = torch.zeros(30)
    expected = float(u @ u + v @ v - 2 * (u @ v).abs())  # tr sqrt(u u' v v') = |u . v|
    got = frechet_distance(zero, torch.outer(u, u), zero, torch.outer(v, v))
    assert got == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rank", [3, 64])
def test_frechet_of_a_gaussian_with_itself_is_zero(rank: int) -> None:
    mean, cov = torch.full((64,), 1e3), covariance(64, rank, 3) * 1e4
    assert frechet_distance(mean, cov, mean, cov) < 1e-10 * float(cov.trace())


def test_frechet_refuses_what_is_no_pair_of_gaussians() -> None:
    mean, cov = torch.zeros(3), torch.eye(3)
    for bad in (torch.eye(4), torch.zeros(3), torch.zeros(3, 3, 1)):
        with pytest.raises(InputError, match="covariances \\(D, D\\)"):
            frechet_distance(mean, cov, mean, bad)
    with pytest.raises(InputError, match="cov2 must be finite"):
        frechet_distance(mean, cov, mean, cov * torch.nan)
    with pytest.raises(InputError, match="mean1 must be finite"):
        frechet_distance(mean + torch.inf, cov, mean, cov)
    with pytest.raises(InputError, match="cov1 must be symmetric and positive"):
        frechet_distance(mean, -cov, mean, cov)
    with pytest.raises(InputError, match="cov2 must be symmetric"):
        frechet_distance(mean, cov, mean, cov + torch.eye(3).roll(1, 0))


def test_statistics_of_batches_are_those_of_the_whole() -> None:
    x = torch.randn(1000, 7, generator=generator(), dtype=torch.float64) @ covariance(7, 9, 1)
    x += 1e6
    stats = GaussianStats()
    for size_first, part in enumerate(torch.split(x, [1, 0, 499, 2, 498])):
        stats.update(part)
        assert size_first or stats.count == 1
    assert stats.count == 1000
    np.testing.assert_allclose(stats.mean, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(stats.covariance, np.cov(x.numpy(), rowvar=False), rtol=1e-8)


def test_statistics_refuse_bad_samples() -> None:
    stats = GaussianStats()
    with pytest.raises(InputError, match="at least 2 samples; got 0"):
        stats.distance(stats)
    stats.update(torch.zeros(1, 4))
    with pytest.raises(InputError, match="at least 2 samples; got 1"):
        _ = stats.covariance
    with pytest.raises(InputError, match=r"\(N, 4\); got \(2, 5\)"):
        stats.update(torch.zeros(2, 5))
    with pytest.raises(InputError, match="finite"):
        stats.update(torch.full((2, 4), torch.nan))
    assert stats.count == 1


# Weights by path


class StandIn(nn.Module):
    """Called as the I3D file is; its features are means, so they can be foretold."""

    def forward(
        self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False
    ) -> Tensor:
        assert (rescale, resize, return_features) == (False, False, True)
        assert x.shape[1:2] + x.shape[3:] == (3, 224, 224)
        return torch.cat([x.mean((2, 3, 4)), x.amin((1, 2, 3, 4)).unsqueeze(1)], dim=1)


class Distance(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        colours = (a - b).abs().mean((2, 3)) * torch.tensor([0.5, 1.0, 1.5])
        return colours.mean(1).reshape(-1, 1, 1, 1)


def save_scripted(module: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(str(path))
    return path


def test_i3d_convention(tmp_path: Path) -> None:
    i3d = I3D(save_scripted(StandIn(), tmp_path / "i3d.pt"), chunk=2)
    clips = random_frames(3, 4, 8, 8)
    clips[1] = 255
    clips[2] = 0
    features = i3d(clips)
    assert features.shape == (3, 4)
    assert features.dtype == torch.float32
    np.testing.assert_allclose(features[1:], [[1] * 4, [-1] * 4], atol=1e-6)
    mean = clips[0].float().mean((0, 1, 2)) / 127.5 - 1
    np.testing.assert_allclose(features[0, :3], mean, atol=2e-3)
    with pytest.raises(InputError, match="FVD: clips must be uint8"):
        i3d(clips.float())


def test_a_network_of_another_convention_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="StyleGAN-V's convention"):
        I3D(save_scripted(nn.ReLU(), tmp_path / "relu.pt"))(random_frames(1, 2, 8, 8))


@pytest.mark.parametrize("load", [I3D, Lpips])
def test_weights_that_are_not_there_or_no_torchscript(
    load: type[I3D] | type[Lpips], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"there is no file .*give the path of"):
        load(tmp_path / "none.pt")
    text = tmp_path / "text.pt"
    text.write_text("not a network")
    with pytest.raises(ConfigError, match=r"is not TorchScript .*give the path of"):
        load(text)


def test_lpips_is_called_with_pictures_in_minus_one_to_one(tmp_path: Path) -> None:
    lpips = Lpips(save_scripted(Distance(), tmp_path / "lpips.pt"), chunk=4)
    a, b = random_frames(2, 3, 8, 8), random_frames(2, 3, 8, 8, seed=1)
    colours = (a.float() - b.float()).abs().mean((-2, -3)) / 127.5
    expected = (colours * torch.tensor([0.5, 1.0, 1.5])).mean(-1)  # red, green, blue
    np.testing.assert_allclose(lpips(a, b), expected, rtol=1e-5)
    with pytest.raises(InputError, match="one shape"):
        lpips(a, b[:1])


def test_resize_keeps_the_middle() -> None:
    wide = torch.zeros(1, 10, 30, 3, dtype=torch.uint8)
    wide[:, :, 10:20] = 200
    assert resize_frames(wide, 10).unique().tolist() == [200]
    assert resize_frames(random_frames(2, 9, 17), 224).shape == (2, 3, 224, 224)


# PSNR and SSIM


def test_psnr() -> None:
    a = random_frames(2, 3, 16, 16)
    b = random_frames(2, 3, 16, 16, seed=1)
    error = np.square(a.numpy().astype(float) - b.numpy().astype(float)).mean((-1, -2, -3))
    np.testing.assert_allclose(psnr(a, b), 20 * np.log10(255) - 10 * np.log10(error), rtol=1e-12)
    assert torch.isinf(psnr(a, a)).all()
    with pytest.raises(InputError, match="uint8"):
        psnr(a.float(), b.float())
    with pytest.raises(InputError, match="one shape"):
        psnr(a, b[:, :2])


def ssim_by_scipy(a: np.ndarray, b: np.ndarray) -> float:
    """Of two (H, W) pictures, from the definition, with SciPy's filter."""
    line = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window = np.outer(line, line) / line.sum() ** 2

    def mean(x: np.ndarray) -> np.ndarray:
        return ndimage.correlate(x, window)[5:-5, 5:-5]

    a, b = a.astype(float), b.astype(float)
    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    c1, c2 = 2.55**2, 7.65**2
    ratio = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    return float(ratio.mean())


def test_ssim_agrees_with_scipy() -> None:
    a = random_frames(2, 2, 20, 24)
    b = (a.float() + 25 * torch.randn(a.shape, generator=generator())).clamp(0, 255).byte()
    expected = [
        [
            np.mean(
                [ssim_by_scipy(a[i, t, ..., c].numpy(), b[i, t, ..., c].numpy()) for c in range(3)]
            )
            for t in range(2)
        ]
        for i in range(2)
    ]
    np.testing.assert_allclose(ssim(a, b), expected, rtol=1e-10)
    np.testing.assert_allclose(ssim(a, a), 1.0, rtol=1e-12)
    with pytest.raises(InputError, match="at least 11 pixels"):
        ssim(a[:, :, :10], b[:, :, :10])


# Protocols


def test_the_papers_numbers() -> None:
    counts = {
        BAIR: (256, 25_600, 1),
        BAIR_DEBIASED: (25_600, 25_600, 1),
        BAIR_DEBIASED_ABLATION: (5_120, 5_120, 1),
        UCF101: (5_000, 5_000, 1),
        KINETICS600: (50_000, 50_000, 5),
        KINETICS600_ABLATION: (10_000, 10_000, 5),
    }
    assert set(counts) == set(PROTOCOLS.values())
    for protocol, (real, fake, conditioning) in counts.items():
        places = (protocol.videos or 256) * protocol.places
        assert places == real
        assert places * protocol.samples == fake
        assert (protocol.conditioning, protocol.predicted) == (conditioning, 16)
    assert [p.resolution for p in (BAIR, UCF101, KINETICS600)] == [64, 256, 64]
    assert [p.name for p in PROTOCOLS.values() if p.start == "first"] == ["bair"]


SMALL = Protocol(
    name="small",
    videos=None,
    start="first",
    places=1,
    samples=3,
    conditioning=2,
    predicted=4,
    resolution=8,
)


def numbered_places() -> list[Tensor]:
    """Place p, frame t is filled with 20 p + t."""
    return [
        (20 * p + torch.arange(6, dtype=torch.uint8))[:, None, None, None].repeat(1, 16, 16, 3)
        for p in range(10)
    ]


def first_two(clips: Tensor) -> Tensor:
    """Features that tell which frames a clip shows."""
    return clips[:, :2, 0, 0, 0].float()


def test_runner_compares_what_follows_the_context() -> None:
    streams: list[int] = []
    batches: list[int] = []

    def oracle(context: Tensor, frames: int, rows: Sequence[int]) -> Tensor:
        assert context.shape[1:] == (2, 16, 16, 3)
        streams.extend(rows)
        batches.append(len(rows))
        return context[:, -1:] + torch.arange(1, frames + 1, dtype=torch.uint8)[:, None, None, None]

    result = run_protocol(SMALL, numbered_places(), oracle, first_two, batch=4)
    assert (result.real_clips, result.generated_clips) == (10, 30)
    assert streams == list(range(30))
    assert batches == [4] * 7 + [2]
    assert json.loads(json.dumps(dataclasses.asdict(result)))["protocol"] == "small"

    once = dataclasses.replace(SMALL, samples=1)
    right = run_protocol(once, numbered_places(), oracle, first_two)
    assert right.frechet == pytest.approx(0, abs=1e-6)

    def late(context: Tensor, frames: int, rows: Sequence[int]) -> Tensor:
        return oracle(context, frames, rows) + 50

    shifted = run_protocol(once, numbered_places(), late, first_two)
    assert shifted.frechet == pytest.approx(2 * 50**2, rel=1e-6)


def test_runner_brings_both_sides_to_the_protocols_size() -> None:
    sizes = set()

    def features(clips: Tensor) -> Tensor:
        sizes.add(tuple(clips.shape[1:]))
        assert clips.dtype == torch.uint8
        return first_two(clips)

    run_protocol(
        SMALL, numbered_places(), lambda c, n, _: c[:, -1:].repeat(1, n, 1, 1, 1), features
    )
    assert sizes == {(4, 8, 8, 3)}


def test_runner_refuses_wrong_predictions() -> None:
    with pytest.raises(InputError, match=r"generate must return uint8 \(16, 4, 16, 16, 3\)"):
        run_protocol(SMALL, numbered_places(), lambda c, n, _: c, first_two)
    with pytest.raises(ConfigError, match="batch must be at least 1"):
        run_protocol(SMALL, numbered_places(), lambda c, n, _: c, first_two, batch=0)
    with pytest.raises(ConfigError, match="places must be at least 1"):
        dataclasses.replace(SMALL, places=0)


def test_shrinking_is_antialiased() -> None:
    stripes = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    stripes[:, :, ::4] = 255
    inside = resize_frames(stripes, 16)[..., 1:-1]
    torch.testing.assert_close(inside, torch.full_like(inside, 255 / 4), atol=1.0, rtol=0)


def test_resize_keeps_the_middle_of_a_tall_picture() -> None:
    tall = torch.zeros(1, 30, 10, 3, dtype=torch.uint8)
    tall[:, 10:20] = 200
    assert resize_frames(tall, 10).unique().tolist() == [200]


def test_clips_of_another_size_are_rounded() -> None:
    clips = random_frames(2, 3, 16, 20)
    want = resize_frames(clips.flatten(0, 1), 8).round().movedim(1, -1)
    assert torch.equal(at_resolution(clips, 8).flatten(0, 1).float(), want)
