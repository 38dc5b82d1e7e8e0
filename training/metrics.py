"""Metrics of predicted video: Fréchet (video) distance, the paper's protocols, PSNR, SSIM, LPIPS.

Notation: B clips, T frames, H rows, W columns, C = 3 colours, N samples, D features. Clips are
uint8 (B, T, H, W, 3) RGB. Statistics are float64.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from canvasmar_rt.errors import ConfigError, InputError

Features = Callable[[Tensor], Tensor]
"""Clips uint8 (B, T, H, W, 3) -> features (N, D), one or more rows a clip."""

# ---------------------------------------------------------------------------------------------
# Fréchet distance


class GaussianStats:
    """Mean and covariance of samples that arrive in batches: memory is D * D, whatever N is.

    Batches are merged by the pairwise update of Chan, Golub and LeVeque (1979), so a large common
    offset costs no digits.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = torch.zeros(0, dtype=torch.float64)
        self._scatter = torch.zeros(0, 0, dtype=torch.float64)

    def update(self, samples: Tensor) -> None:
        """Add samples (N, D), any floating type, on any device.

        Raises:
            InputError: another rank or D than before, or a value that is not finite.
        """
        if samples.ndim != 2 or (self.count and samples.shape[1] != len(self._mean)):
            width = f"{len(self._mean)}" if self.count else "D"
            raise InputError(
                f"Gaussian statistics: samples must be (N, {width}); got {tuple(samples.shape)}."
            )
        if not len(samples):
            return
        x = samples.detach().to("cpu", torch.float64)
        if not bool(torch.isfinite(x).all()):
            raise InputError("Gaussian statistics: samples must be finite; got NaN or infinity.")
        mean = x.mean(0)
        centred = x - mean
        scatter = centred.T @ centred
        if not self.count:
            self.count, self._mean, self._scatter = len(x), mean, scatter
            return
        total = self.count + len(x)
        shift = mean - self._mean
        self._scatter += scatter + torch.outer(shift, shift) * (self.count * len(x) / total)
        self._mean = self._mean + shift * (len(x) / total)
        self.count = total

    @property
    def mean(self) -> Tensor:
        """(D,) float64."""
        self._require_two()
        return self._mean.clone()

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64, unbiased: divided by N - 1."""
        self._require_two()
        return self._scatter / (self.count - 1)

    def distance(self, other: GaussianStats) -> float:
        """Fréchet distance to other samples; see `frechet_distance`."""
        return frechet_distance(self.mean, self.covariance, other.mean, other.covariance)

    def _require_two(self) -> None:
        if self.count < 2:
            raise InputError(
                f"Gaussian statistics: a covariance takes at least 2 samples; got {self.count}."
            )


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), the squared 2-Wasserstein distance of Gaussians.

    The last trace is the nuclear norm of C1^(1/2) C2^(1/2), which rank-deficient covariances do
    not upset, as a square root of the product does. Never negative.

    Args:
        mean1, mean2: (D,).
        cov1, cov2: (D, D), symmetric and positive semi-definite.

    Raises:
        InputError: shapes that do not fit together, values that are not finite, or a matrix that
            is no covariance.
    """
    tensors = [t.detach().to("cpu", torch.float64) for t in (mean1, cov1, mean2, cov2)]
    d = len(mean1) if mean1.ndim == 1 else -1
    for name, tensor, rank in zip(
        ("mean1", "cov1", "mean2", "cov2"), tensors, (1, 2) * 2, strict=True
    ):
        if tuple(tensor.shape) != (d,) * rank or d < 1:
            raise InputError(
                "Fréchet distance: expected means (D,) and covariances (D, D) of one D; got "
                f"{', '.join(str(tuple(t.shape)) for t in tensors)}."
            )
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"Fréchet distance: {name} must be finite; got NaN or infinity.")
    m1, c1, m2, c2 = tensors
    cross = torch.linalg.svdvals(_root(c1, "cov1") @ _root(c2, "cov2")).sum()
    distance = (m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * cross
    return max(float(distance), 0.0)


def _root(covariance: Tensor, name: str) -> Tensor:
    """The symmetric square root of a covariance."""
    scale = float(covariance.abs().max())
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    asymmetry = float((covariance - covariance.T).abs().max())
    if asymmetry > 1e-6 * scale or float(values.min()) < -1e-6 * scale:
        raise InputError(
            f"Fréchet distance: {name} must be symmetric and positive semi-definite; its smallest "
            f"eigenvalue is {float(values.min()):.3g}, its asymmetry {asymmetry:.3g}."
        )
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


# ---------------------------------------------------------------------------------------------
# Networks whose weights are given by path


def _load_torchscript(
    path: str | Path, what: str, advice: str, device: torch.device | str
) -> torch.jit.ScriptModule:
    """A TorchScript file, ready for inference. The caller vouches for it: it holds code."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{what}: there is no file {path}; {advice}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            module = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(f"{what}: {path} is not TorchScript ({reason}); {advice}") from None
    script: torch.jit.ScriptModule = module.eval().to(device)
    return script


class I3D:
    """Features of whole clips for the Fréchet video distance (Unterthiner et al. 2018).

    Weights are a TorchScript file of the convention that StyleGAN-V's evaluation began and others
    took up (`i3d_torchscript.pt`): the module is called with one tensor float32
    (B, 3, T, 224, 224) in [-1, 1] and the keywords rescale=False, resize=False,
    return_features=True, and returns (B, D), D = 400 for the usual file. Pixel range and size are
    brought about here: the shorter side is resized to 224 (bilinear, with antialiasing when it
    shrinks) and the longer one cropped to its middle. The usual file needs clips of at least 10
    frames. Figures of different weights or resizing must not be compared.
    """

    SIZE = 224

    def __init__(
        self, path: str | Path, *, device: torch.device | str = "cpu", chunk: int = 16
    ) -> None:
        """Load the weights.

        Args:
            path: the TorchScript file; it holds code, so take it from a source you trust.
            chunk: clips that go through the network together.

        Raises:
            ConfigError: no such file, or not TorchScript.
        """
        self._device, self._chunk = torch.device(device), chunk
        self._module = _load_torchscript(
            path, "FVD", "give the path of i3d_torchscript.pt (StyleGAN-V's I3D detector).", device
        )

    @torch.inference_mode()
    def __call__(self, clips: Tensor) -> Tensor:
        """Clips uint8 (B, T, H, W, 3) -> features float32 (B, D), on the CPU.

        Raises:
            InputError: clips of another type or rank.
            ConfigError: the network cannot be called by the convention above.
        """
        _check_clips(clips, "FVD")
        return torch.cat([self._features(part) for part in torch.split(clips, self._chunk)])

    def _features(self, clips: Tensor) -> Tensor:
        b, t = clips.shape[:2]
        x = resize_frames(clips.to(self._device).flatten(0, 1), self.SIZE)
        x = (x / 127.5 - 1).reshape(b, t, 3, self.SIZE, self.SIZE).transpose(1, 2).contiguous()
        try:
            out = self._module(x, rescale=False, resize=False, return_features=True)
        except RuntimeError as error:
            reason = str(error).strip().split("\n")[-1]
            raise ConfigError(
                "FVD: the network failed on (B, 3, T, 224, 224) with rescale, resize and "
                f"return_features ({reason}); give a file of StyleGAN-V's convention."
            ) from None
        if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != b:
            raise ConfigError(
                f"FVD: the network must return ({b}, D); got {getattr(out, 'shape', type(out))}."
            )
        return out.float().cpu()


def resize_frames(frames: Tensor, size: int) -> Tensor:
    """Frames uint8 (N, H, W, 3) -> float32 (N, 3, size, size) in [0, 255].

    The shorter side becomes `size` (bilinear, antialiased when it shrinks), then the middle is
    cropped.
    """
    x = frames.movedim(-1, 1).float()
    h, w = x.shape[-2:]
    if min(h, w) != size:
        factor = size / min(h, w)
        goal = (max(size, round(h * factor)), max(size, round(w * factor)))
        x = functional.interpolate(
            x, goal, mode="bilinear", align_corners=False, antialias=factor < 1
        )
    top, left = (x.shape[-2] - size) // 2, (x.shape[-1] - size) // 2
    return x[..., top : top + size, left : left + size]


class Lpips:
    """Learned perceptual distance (Zhang et al. 2018), from a TorchScript file.

    The module is called with two tensors float32 (N, 3, H, W) in [-1, 1] and returns one number
    a picture, in any shape of N entries; `torch.jit.trace` of the `lpips` package's model is such
    a file.
    """

    def __init__(
        self, path: str | Path, *, device: torch.device | str = "cpu", chunk: int = 64
    ) -> None:
        """Load the weights.

        Raises:
            ConfigError: no such file, or not TorchScript.
        """
        self._device, self._chunk = torch.device(device), chunk
        self._module = _load_torchscript(
            path, "LPIPS", "give the path of a traced LPIPS network: f(a, b) -> distance.", device
        )

    @torch.inference_mode()
    def __call__(self, real: Tensor, predicted: Tensor) -> Tensor:
        """Two uint8 (..., H, W, 3) -> distances float32 (...), on the CPU; 0 is best.

        Raises:
            InputError: frames of another type, or two shapes.
            ConfigError: the network cannot be called by the convention above.
        """
        _check_same(real, predicted, "LPIPS")
        flat = [torch.split(x.reshape(-1, *x.shape[-3:]), self._chunk) for x in (real, predicted)]
        parts = []
        for pair in zip(*flat, strict=True):
            a, b = (x.to(self._device).movedim(-1, 1).float() / 127.5 - 1 for x in pair)
            try:
                out = self._module(a, b)
            except RuntimeError as error:
                reason = str(error).strip().split("\n")[-1]
                raise ConfigError(
                    f"LPIPS: the network failed on two (N, 3, H, W) tensors ({reason})."
                ) from None
            if not isinstance(out, Tensor) or out.numel() != len(a):
                raise ConfigError(
                    f"LPIPS: the network must return {len(a)} numbers; got "
                    f"{getattr(out, 'shape', type(out))}."
                )
            parts.append(out.reshape(-1).float().cpu())
        return torch.cat(parts).reshape(real.shape[:-3])


# ---------------------------------------------------------------------------------------------
# Frame by frame


def psnr(real: Tensor, predicted: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each frame: two uint8 (..., H, W, 3) -> float64 (...), dB.

    The data range is 255; equal frames give infinity.

    Raises:
        InputError: frames of another type, or two shapes.
    """
    _check_same(real, predicted, "PSNR")
    error = (real.double() - predicted.double()).square().mean((-1, -2, -3))
    return 10 * torch.log10(255.0**2 / error)


def psnr_of_mean_error(each: Tensor, dim: int | None = None) -> Tensor:
    """PSNR of the mean squared error of frames whose own is `each` (...), dB, over all of them or
    one dimension: the worst frames weigh on it, and a few equal frames do not make it infinite."""
    return -10 * torch.log10((10 ** (-each / 10)).mean(dim))


_SSIM_RADIUS, _SSIM_SIGMA, _SSIM_K1, _SSIM_K2 = 5, 1.5, 0.01, 0.03


def ssim(real: Tensor, predicted: Tensor) -> Tensor:
    """Structural similarity of each frame: two uint8 (..., H, W, 3) -> float64 (...), 1 is best.

    Wang et al. 2004 with their constants: an 11 x 11 Gaussian window of standard deviation 1.5,
    K1 = 0.01, K2 = 0.03, data range 255; only windows that lie wholly inside the picture count,
    and the three colours are averaged.

    Raises:
        InputError: frames of another type, two shapes, or a side below 11 pixels.
    """
    _check_same(real, predicted, "SSIM")
    if min(real.shape[-3:-1]) < 2 * _SSIM_RADIUS + 1:
        raise InputError(
            f"SSIM: frames must be at least 11 pixels a side; got {tuple(real.shape[-3:-1])}."
        )
    line = torch.arange(-_SSIM_RADIUS, _SSIM_RADIUS + 1, device=real.device, dtype=torch.float64)
    weight = torch.exp(-0.5 * (line / _SSIM_SIGMA) ** 2)
    weight = weight / weight.sum()

    def mean(x: Tensor) -> Tensor:
        x = functional.conv2d(x, weight[None, None, :, None])
        return functional.conv2d(x, weight[None, None, None, :])

    h, w = real.shape[-3:-1]
    flat = [torch.split(x.reshape(-1, h, w, 3), 64) for x in (real, predicted)]
    parts = []
    for pair in zip(*flat, strict=True):
        x, y = (p.double().movedim(-1, 1).reshape(-1, 1, h, w) for p in pair)
        mx, my = mean(x), mean(y)
        vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
        c1, c2 = (_SSIM_K1 * 255) ** 2, (_SSIM_K2 * 255) ** 2
        value = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
        parts.append(value.mean((1, 2, 3)).reshape(-1, 3).mean(-1))
    return torch.cat(parts).reshape(real.shape[:-3])


def _check_clips(clips: Tensor, where: str) -> None:
    if clips.ndim != 5 or clips.shape[-1] != 3 or clips.dtype != torch.uint8 or not clips.numel():
        raise InputError(
            f"{where}: clips must be uint8 (B, T, H, W, 3); got {clips.dtype} {tuple(clips.shape)}."
        )


def _check_same(real: Tensor, predicted: Tensor, where: str) -> None:
    for frames in (real, predicted):
        if frames.ndim < 3 or frames.shape[-1] != 3 or frames.dtype != torch.uint8:
            raise InputError(
                f"{where}: frames must be uint8 (..., H, W, 3); got {frames.dtype} "
                f"{tuple(frames.shape)}."
            )
    if real.shape != predicted.shape or not real.numel():
        raise InputError(
            f"{where}: two sets of frames of one shape; got {tuple(real.shape)} and "
            f"{tuple(predicted.shape)}."
        )


# ---------------------------------------------------------------------------------------------
# The paper's protocols (appendix A; resolutions from table 3)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Which clips are real, what they are predicted from, and how many predictions are drawn.

    A *place* is a run of `conditioning + predicted` frames of a test video. The predicted part of
    a place is one sample of the real distribution; every prediction from its conditioning part,
    without that part, is one of the fake distribution.
    """

    name: str
    videos: int | None
    """Test videos drawn; None takes each one once, in order."""
    start: Literal["first", "random"]
    """Whether a place begins with the video, or anywhere in it."""
    places: int
    """Places drawn in each video."""
    samples: int
    """Predictions drawn for each place."""
    conditioning: int
    """Frames given."""
    predicted: int
    """Frames predicted, and compared."""
    resolution: int
    """Side of the frames compared, in pixels; larger ones are shrunk."""
    recordings: int | None = None
    """Test videos that the data set has, where no list of its own says which are missing."""

    def __post_init__(self) -> None:
        for name in ("places", "samples", "conditioning", "predicted", "resolution"):
            if getattr(self, name) < 1:
                raise ConfigError(f"protocol {self.name}: {name} must be at least 1; got {self}.")
        if self.videos is not None and self.videos < 1:
            raise ConfigError(f"protocol {self.name}: videos must be at least 1; got {self}.")
        if self.start not in ("first", "random"):
            raise ConfigError(f"protocol {self.name}: start must be first or random; got {self}.")


BAIR = Protocol(
    name="bair",
    videos=None,
    recordings=256,
    start="first",
    places=1,
    samples=100,
    conditioning=1,
    predicted=16,
    resolution=64,
)
"""Standard FVD of the system-level comparison: 256 real clips, 256 * 100 predictions."""

BAIR_DEBIASED = Protocol(
    name="bair-debiased",
    videos=None,
    recordings=256,
    start="random",
    places=100,
    samples=1,
    conditioning=1,
    predicted=16,
    resolution=64,
)
"""Debiased FVD: the conditioning frame of a video is drawn anew 100 times, and the real clips are
those that follow the frames drawn: 256 * 100 on each side."""

BAIR_DEBIASED_ABLATION = Protocol(
    name="bair-debiased-ablation",
    videos=None,
    recordings=256,
    start="random",
    places=20,
    samples=1,
    conditioning=1,
    predicted=16,
    resolution=64,
)
"""Debiased FVD of the ablations. Appendix A says 256 * K predictions, K = 20, of a procedure
repeated 100 times, which cannot both be; here it is repeated K times, as for K = 100."""

UCF101 = Protocol(
    name="ucf101",
    videos=5_000,
    start="random",
    places=1,
    samples=1,
    conditioning=1,
    predicted=16,
    resolution=256,
)
"""Appendix A has 5,000 test videos, the official lists fewer (3,783 in the first): after one pass
a second one draws other windows of the same videos."""

KINETICS600 = Protocol(
    name="kinetics600",
    videos=50_000,
    start="random",
    places=1,
    samples=1,
    conditioning=5,
    predicted=16,
    resolution=64,
)
"""System-level comparison; made at 128 pixels and compared at 64 (table 3)."""

KINETICS600_ABLATION = Protocol(
    name="kinetics600-ablation",
    videos=10_000,
    start="random",
    places=1,
    samples=1,
    conditioning=5,
    predicted=16,
    resolution=64,
)

PROTOCOLS = {
    p.name: p
    for p in (
        BAIR,
        BAIR_DEBIASED,
        BAIR_DEBIASED_ABLATION,
        UCF101,
        KINETICS600,
        KINETICS600_ABLATION,
    )
}

Generate = Callable[[Tensor, int, Sequence[int]], Tensor]
"""(context uint8 (B, conditioning, H, W, 3), frames, streams) -> uint8 (B, frames, H, W, 3).

`streams` holds one number a row, which no other prediction of the run has: key the noise by it."""


@dataclass(frozen=True, kw_only=True)
class ProtocolResult:
    """Fréchet distance under a protocol; JSON-ready by `dataclasses.asdict`."""

    protocol: str
    frechet: float
    real_clips: int
    generated_clips: int
    seed: int


def run_protocol(
    protocol: Protocol,
    places: Sequence[Tensor],
    generate: Generate,
    features: Features,
    *,
    seed: int = 0,
    batch: int = 16,
) -> ProtocolResult:
    """Predict and compare by a protocol; `features=I3D(path)` makes it the FVD.

    Args:
        places: uint8 (conditioning + predicted, H, W, 3) each, in the size that `generate` works
            at; a sequence that reads its items from disk will do, and each is read once, in order.
        generate: see `Generate`.
        features: see `Features`.
        seed: of the run; it goes into the result.

    Raises:
        InputError: places that are not uint8 RGB, or predictions of a wrong shape.
        ConfigError: `batch` is below 1.
    """
    if batch < 1:
        raise ConfigError(f"protocol {protocol.name}: batch must be at least 1; got {batch}.")
    real, fake = GaussianStats(), GaussianStats()
    waiting: list[Tensor] = []
    done = 0

    def flush() -> None:
        nonlocal done
        context = torch.stack(waiting)
        made = generate(context, protocol.predicted, range(done, done + len(waiting)))
        wanted = (len(waiting), protocol.predicted, *context.shape[2:])
        if tuple(made.shape) != wanted or made.dtype != torch.uint8:
            raise InputError(
                f"protocol {protocol.name}: generate must return uint8 {wanted}; got "
                f"{made.dtype} {tuple(made.shape)}."
            )
        fake.update(features(at_resolution(made, protocol.resolution)))
        done += len(waiting)
        waiting.clear()

    for number in range(len(places)):
        clip = places[number]
        _check_clips(clip[None], f"protocol {protocol.name}, place {number}")
        real.update(
            features(at_resolution(clip[None, protocol.conditioning :], protocol.resolution))
        )
        for _ in range(protocol.samples):
            waiting.append(clip[: protocol.conditioning])
            if len(waiting) == batch:
                flush()
    if waiting:
        flush()
    return ProtocolResult(
        protocol=protocol.name,
        frechet=real.distance(fake),
        real_clips=len(places),
        generated_clips=done,
        seed=seed,
    )


def at_resolution(clips: Tensor, resolution: int) -> Tensor:
    """Clips uint8 (B, T, H, W, 3), shrunk or enlarged to the resolution if they have another."""
    if tuple(clips.shape[2:4]) == (resolution, resolution):
        return clips
    b, t = clips.shape[:2]
    x = resize_frames(clips.flatten(0, 1), resolution).round().clamp(0, 255).to(torch.uint8)
    return x.movedim(1, -1).reshape(b, t, resolution, resolution, 3)
