"""Metrics of predicted ToyTable video: a Fréchet distance of its own, and readings from pixels.

* `pair_features`: features of pairs of consecutive frames, whose Fréchet distance is taken. They
  come from a small network that was trained to tell the simulator's state and what is wrong with
  the pictures, and whose file holds its held-out figures (`MetricCard`, the metadata `card`).
* `gripper_errors`, `toys_kept`, `colourfulness`, `sharpness`: what pixels tell without a network.
* `ToyTableEvaluator`: all of them, over any number of batches.

    python -m training.toytable_metrics train --out metric.safetensors

Notation: B clips, T frames, M pairs of frames, D features, H = W = 64, C = 3 colours. Frames are
uint8 (..., H, W, 3) RGB. Positions in table widths become pixels by a factor of W.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from canvasmar_rt.command import run_command, stderr_bar
from canvasmar_rt.errors import ConfigError, InputError
from canvasmar_rt.files import check_writable, replacing
from training.metrics import GaussianStats
from training.toytable import TOY_HUES, ToyTableConfig, generate, gripper_from_pixels, reset

# ---------------------------------------------------------------------------------------------
# The network

METRIC_FILE = Path(__file__).parent / "data" / "toytable_metric.safetensors"
FEATURES = 64
METRIC_SIZE = 64
_CELLS = 8  # the maps of toys are 8 x 8
_HIDDEN = 128
# What the heads tell of a pair of frames: name -> numbers. The last four are what is wrong with
# the pictures: blur (standard deviation, px), noise (standard deviation), colour lost (share),
# cells that show another part of the picture (share).
_HEADS = {
    "gripper": 2,
    "action": 2,
    "count": 1,
    "motion": 1,
    "occupancy": _CELLS**2,
    "colour": 3 * _CELLS**2,
    "fault": 4,
}
_HEAD_WEIGHTS = {
    "gripper": 2.0,
    "action": 2.0,
    "count": 0.5,
    "motion": 0.5,
    "occupancy": 2.0,
    "colour": 1.0,
    "fault": 0.5,
}


class _Block(nn.Module):
    """A residual block; its branch starts small, so no normalisation is needed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.gain = nn.Parameter(torch.full((1,), 0.2))

    def forward(self, x: Tensor) -> Tensor:
        branch = self.second(functional.silu(self.first(functional.silu(x))))
        out: Tensor = x + self.gain * branch
        return out


class MetricNet(nn.Module):
    """Tells the state of the table from two frames, by way of `FEATURES` numbers.

    `shift` and `scale` (D,) give every feature zero mean and unit variance on real pairs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(6, 48, 4, stride=4),
            _Block(48),
            _Block(48),
            nn.SiLU(),
            nn.Conv2d(48, 96, 3, stride=2, padding=1),
            _Block(96),
            _Block(96),
            nn.SiLU(),
            nn.Conv2d(96, 24, 1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(24 * (METRIC_SIZE // 8) ** 2, FEATURES),
        )
        self.heads = nn.Sequential(
            nn.Linear(FEATURES, _HIDDEN), nn.SiLU(), nn.Linear(_HIDDEN, sum(_HEADS.values()))
        )
        self.shift: Tensor
        self.scale: Tensor
        self.register_buffer("shift", torch.zeros(FEATURES))
        self.register_buffer("scale", torch.ones(FEATURES))

    def forward(self, pairs: Tensor) -> Tensor:
        """Pairs (M, 2, H, W, 3), uint8 or float in [0, 255] -> features (M, D)."""
        x = pairs.permute(0, 1, 4, 2, 3).flatten(1, 2).to(self.shift.dtype) / 127.5 - 1
        features: Tensor = (self.trunk(x) - self.shift) * self.scale
        return features

    def readings(self, features: Tensor) -> dict[str, Tensor]:
        """What the heads tell of features (M, D), each in units of its spread in training."""
        out = self.heads(features / self.scale + self.shift)
        parts = torch.split(out, list(_HEADS.values()), dim=-1)
        return dict(zip(_HEADS, parts, strict=True))


@cache
def metric_net(path: Path = METRIC_FILE) -> MetricNet:
    """The trained network, float32 on the CPU, loaded once a path.

    Raises:
        ConfigError: there is no such file, or it holds another network.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        net = MetricNet()
        net.load_state_dict(tensors)
    except Exception as error:
        raise ConfigError(
            f"ToyTable metric: cannot read {path} ({error}); "
            "train one with: python -m training.toytable_metrics train --out FILE"
        ) from None
    return net.eval().requires_grad_(False)


@torch.inference_mode()
def pair_features(frames: Tensor, *, net: MetricNet | None = None, chunk: int = 256) -> Tensor:
    """Features of every pair of consecutive frames: uint8 (B, T, 64, 64, 3) -> (B, T - 1, D).

    Float32, on the device of the frames; of zero mean and unit variance on real clips.

    Raises:
        InputError: frames of another type or size, or fewer than two of them.
    """
    _check_frames(frames, "pair_features", frames=2, size=METRIC_SIZE)
    net = (net or metric_net()).to(frames.device)
    b, t = frames.shape[:2]
    pairs = torch.stack((frames[:, :-1], frames[:, 1:]), dim=2).flatten(0, 1)
    features = torch.cat([net(part) for part in torch.split(pairs, chunk)])
    return features.reshape(b, t - 1, FEATURES)


def _check_frames(tensor: Tensor, where: str, *, frames: int = 1, size: int | None = None) -> None:
    fits = tensor.ndim == 5 and tensor.shape[-1] == 3 and tensor.shape[1] >= frames
    if size is not None:
        fits = fits and tuple(tensor.shape[2:4]) == (size, size)
    if not fits or tensor.dtype != torch.uint8:
        sides = "H, W" if size is None else f"{size}, {size}"
        raise InputError(
            f"{where}: frames must be uint8 (B, T >= {frames}, {sides}, 3); got "
            f"{tensor.dtype} {tuple(tensor.shape)}."
        )


# ---------------------------------------------------------------------------------------------
# Readings from pixels

MISSING_SHARE_OF_WIDTH = 0.5
"""What a gripper that is not found counts for where a penalty is asked: half the width, about the
mean distance of two random places."""

_TOY_WINDOW = 15 / 64  # side of a square that holds any toy, in table widths
_MIN_TOY_PIXELS = 12 / 64**2  # of the picture: the smallest toy shows about 25 / 64**2
_MIN_SATURATION, _MIN_VALUE = 0.62, 0.2  # tables stay below, toys above
_HUE_REACH = 0.05  # turns
_LAST = 8  # frames of a prediction, in one of which a toy has to be seen

KEPT_SHARE = 0.3
"""Of a toy's area, with which it counts as kept."""


def gripper_errors(context: Tensor, predicted: Tensor, actions: Tensor) -> Tensor:
    """Distance between the gripper seen and where the actions take it: (B, T), in pixels.

    It starts where it is seen in the last frame of the context. NaN where a predicted frame shows
    no gripper. Float32.

    Args:
        context: uint8 (B, at least 1, H, W, 3), real frames.
        predicted: uint8 (B, T, H, W, 3).
        actions: (B, T, 2), table widths; `actions[:, t]` leads to `predicted[:, t]`.

    Raises:
        InputError: shapes that do not fit together, or a context that shows no gripper.
    """
    _check_frames(context, "gripper_errors context")
    _check_frames(predicted, "gripper_errors predicted")
    if actions.shape != (*predicted.shape[:2], 2) or len(context) != len(predicted):
        raise InputError(
            f"gripper_errors: expected context of {len(predicted)} clips and actions "
            f"{(*predicted.shape[:2], 2)}, one a predicted frame; got {len(context)} clips and "
            f"{tuple(actions.shape)}."
        )
    start = gripper_from_pixels(context[:, -1])
    lost = torch.isnan(start).any(-1)
    if bool(lost.any()):
        raise InputError(
            "gripper_errors: the last context frame of clip "
            f"{int(lost.int().argmax())} shows no gripper; contexts must be real ToyTable frames."
        )
    expected = start.unsqueeze(1) + actions.cumsum(1)
    seen = gripper_from_pixels(predicted)
    distance: Tensor = (seen - expected).norm(dim=-1) * predicted.shape[3]
    return distance


@dataclass(frozen=True, kw_only=True)
class ToysKept:
    """Which of the toys seen in the context are still there at the end of a prediction.

    A toy is known by its hue: no two of a table share one of the six.
    """

    seen: Tensor  # (B, 6) bool, in the context, by hue: red, orange, yellow, green, cyan, blue
    kept: Tensor  # (B, 6) bool, seen and still there
    extra: Tensor  # (B, 6) bool, there at the end but not seen in the context

    @property
    def share(self) -> Tensor:
        """(B,) float32: toys kept, as a share of those seen; NaN for a table without toys."""
        return self.kept.sum(-1) / self.seen.sum(-1)

    @property
    def all_kept(self) -> Tensor:
        """(B,) bool: every toy seen is kept."""
        return (self.kept == self.seen).all(-1)


def toys_kept(context: Tensor, predicted: Tensor) -> ToysKept:
    """Judge which toys outlive a prediction, from saturated patches of their hues.

    A toy is kept if in one of the last `_LAST` predicted frames a patch of its hue, no wider than a
    toy can be, has `KEPT_SHARE` of the greatest area it had in the context: so the arm may hide a
    toy, but not all the while. Of the toys of true clips of 100 frames 98.7% are judged kept.

    Args:
        context: uint8 (B, at least 1, H, W, 3).
        predicted: uint8 (B, T, H, W, 3); of a T below `_LAST`, all frames are looked at.

    Raises:
        InputError: frames of another type or rank, or clips that do not match.
    """
    _check_frames(context, "toys_kept context")
    _check_frames(predicted, "toys_kept predicted")
    if context.shape[0] != predicted.shape[0] or context.shape[2:] != predicted.shape[2:]:
        raise InputError(
            f"toys_kept: context {tuple(context.shape)} and predicted {tuple(predicted.shape)} "
            "must have the same clips and size."
        )
    before = toy_areas(context).amax(1)
    after = toy_areas(predicted[:, -_LAST:]).amax(1)
    least = _MIN_TOY_PIXELS * context.shape[2] * context.shape[3]
    seen = before >= least
    return ToysKept(
        seen=seen, kept=seen & (after >= KEPT_SHARE * before), extra=~seen & (after >= least)
    )


def toy_areas(frames: Tensor) -> Tensor:
    """Pixels of the largest patch of each toy hue: uint8 (B, T, H, W, 3) -> float32 (B, T, 6).

    A patch is what a window of a toy's size holds; pixels whose neighbours are mostly of other
    hues (noise) do not count.
    """
    _check_frames(frames, "toy_areas")
    b, t, w = *frames.shape[:2], frames.shape[3]
    window = 2 * math.floor(_TOY_WINDOW * w / 2) + 1
    hues = torch.tensor(TOY_HUES, device=frames.device)[:, None, None]
    parts = []
    for part in torch.split(frames.flatten(0, 1), 64):
        red, green, blue = (part.float() / 255).unbind(-1)
        value = torch.maximum(torch.maximum(red, green), blue)
        chroma = value - torch.minimum(torch.minimum(red, green), blue)
        safe = chroma.clamp(min=1e-6)
        hue = torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4)
        hue = torch.where(value == red, ((green - blue) / safe) % 6, hue) / 6
        away = ((hue.unsqueeze(1) - hues + 0.5) % 1 - 0.5).abs()  # (N, 6, H, W)
        vivid = (chroma > _MIN_SATURATION * value) & (value > _MIN_VALUE)
        mask = (away == away.amin(1, keepdim=True)) & (away < _HUE_REACH) & vivid.unsqueeze(1)
        inner = mask & (_box(mask.float(), 3) > 4.5)
        parts.append(_box(inner.float(), window).flatten(2).amax(-1).round())
    return torch.cat(parts).reshape(b, t, len(TOY_HUES))


def _box(x: Tensor, side: int) -> Tensor:
    """Sums over squares around every pixel of (N, 6, H, W), zeros beyond the edge."""
    x = functional.avg_pool2d(x, (1, side), 1, (0, side // 2)) * side
    return functional.avg_pool2d(x, (side, 1), 1, (side // 2, 0)) * side


def colourfulness(frames: Tensor) -> Tensor:
    """Mean chroma, the largest less the smallest of a pixel's colours: (B, T), in 0..1.

    A prediction that drifts to grey loses it.
    """
    _check_frames(frames, "colourfulness")
    spread = frames.amax(-1).float() - frames.amin(-1).float()
    return spread.mean((-1, -2)) / 255


def sharpness(frames: Tensor) -> Tensor:
    """Energy of fine detail: (B, T), mean square of what a 3 x 3 mean takes off, grey levels^2.

    A blurred prediction loses it, a noisy one gains it.
    """
    _check_frames(frames, "sharpness")
    grey = frames.float().mean(-1).flatten(0, 1).unsqueeze(1)
    smooth = functional.avg_pool2d(grey, 3, 1)
    energy = (grey[..., 1:-1, 1:-1] - smooth).square().mean((1, 2, 3))
    return energy.reshape(frames.shape[:2])


# ---------------------------------------------------------------------------------------------
# All of it


@dataclass(frozen=True, kw_only=True)
class ToyTableReport:
    """Metrics of predicted clips, each beside what true clips reach; JSON-ready by `asdict`.

    Tuples have one entry a predicted frame. None stands for a number that no frame gives.
    """

    clips: int
    frames: int
    frechet: float
    """Of `pair_features` of true and predicted frames, the step out of the context included."""
    gripper_px: float | None
    """Mean error of the gripper where one is found, in pixels."""
    gripper_penalised_px: float
    """The same, a missing gripper counting as half the width (`MISSING_SHARE_OF_WIDTH`)."""
    gripper_missing: float
    """Share of the frames in which none is found."""
    gripper_px_by_frame: tuple[float | None, ...]
    true_gripper_px: float | None
    """The reading's own error, on the true frames: the best there is."""
    frozen_gripper_px: float
    """The error of a prediction that repeats the last context frame."""
    toys_kept: float | None
    """Mean over clips of the share of toys kept."""
    all_toys_kept: float
    """Share of the clips that keep every toy."""
    extra_toys: float
    """Toys at the end that the context did not show, per clip."""
    true_toys_kept: float | None
    true_all_toys_kept: float
    true_extra_toys: float
    colour_ratio_by_frame: tuple[float | None, ...]
    """`colourfulness` of predicted by that of true frames; 1 is best."""
    sharpness_ratio_by_frame: tuple[float | None, ...]


class ToyTableEvaluator:
    """Gathers the metrics of batch after batch; memory does not grow with their number."""

    def __init__(self) -> None:
        self._stats = {side: GaussianStats() for side in _SIDES}
        self._sums: dict[str, Tensor] = {}
        self._clips = 0
        self._frames = 0

    def update(self, context: Tensor, predicted: Tensor, real: Tensor, actions: Tensor) -> None:
        """Add a batch of clips.

        Args:
            context: uint8 (B, at least 1, 64, 64, 3), the true frames predicted from.
            predicted, real: uint8 (B, T, 64, 64, 3); T is the same in every batch.
            actions: (B, T, 2), table widths; `actions[:, t]` leads to frame t of both.

        Raises:
            InputError: shapes that do not fit together, or a context that shows no gripper.
        """
        for name, frames in (("context", context), ("predicted", predicted), ("real", real)):
            _check_frames(frames, f"ToyTable evaluator, {name}", size=METRIC_SIZE)
        t = predicted.shape[1]
        if predicted.shape != real.shape or (self._clips and t != self._frames):
            raise InputError(
                f"ToyTable evaluator: predicted and real must both be (B, T, 64, 64, 3), T the "
                f"same in every batch; got {tuple(predicted.shape)} and {tuple(real.shape)}"
                + (f" after clips of {self._frames} frames." if self._clips else ".")
            )
        sums: dict[str, Tensor] = {}
        last = context[:, -1:]
        for side, frames in zip(_SIDES, (real, predicted), strict=True):
            errors = gripper_errors(context, frames, actions)
            found = ~torch.isnan(errors)
            toys = toys_kept(context, frames)
            share = toys.share
            sums |= {
                f"{side} error": torch.where(found, errors, 0.0).sum(0),
                f"{side} found": found.sum(0),
                f"{side} kept": share.nansum(),
                f"{side} with toys": (~share.isnan()).sum(),
                f"{side} all kept": toys.all_kept.sum(),
                f"{side} extra": toys.extra.sum(),
                f"{side} colour": colourfulness(frames).sum(0),
                f"{side} sharpness": sharpness(frames).sum(0),
            }
            features = pair_features(torch.cat((last, frames), dim=1))
            self._stats[side].update(features.flatten(0, 1))
        sums["frozen"] = actions.cumsum(1).norm(dim=-1).sum() * METRIC_SIZE
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().to("cpu", torch.float64)
        self._clips += len(predicted)
        self._frames = t

    def report(self) -> ToyTableReport:
        """The metrics of all clips so far.

        Raises:
            InputError: fewer than two pairs of frames were added.
        """
        distance = self._stats["true"].distance(self._stats["predicted"])
        s, clips, total = self._sums, self._clips, self._clips * self._frames

        def number(name: str) -> float:
            return float(s[name])

        def per_frame(over: str, under: str) -> tuple[float | None, ...]:
            pairs = zip(s[over].tolist(), s[under].tolist(), strict=True)
            return tuple(a / b if b else None for a, b in pairs)

        def mean(side: str, over: str, under: str) -> float | None:
            count = float(s[f"{side} {under}"].sum())
            return float(s[f"{side} {over}"].sum()) / count if count else None

        missing = total - float(s["predicted found"].sum())
        penalty = missing * METRIC_SIZE * MISSING_SHARE_OF_WIDTH
        return ToyTableReport(
            clips=clips,
            frames=self._frames,
            frechet=distance,
            gripper_px=mean("predicted", "error", "found"),
            gripper_penalised_px=(float(s["predicted error"].sum()) + penalty) / total,
            gripper_missing=missing / total,
            gripper_px_by_frame=per_frame("predicted error", "predicted found"),
            true_gripper_px=mean("true", "error", "found"),
            frozen_gripper_px=number("frozen") / total,
            toys_kept=mean("predicted", "kept", "with toys"),
            all_toys_kept=number("predicted all kept") / clips,
            extra_toys=number("predicted extra") / clips,
            true_toys_kept=mean("true", "kept", "with toys"),
            true_all_toys_kept=number("true all kept") / clips,
            true_extra_toys=number("true extra") / clips,
            colour_ratio_by_frame=per_frame("predicted colour", "true colour"),
            sharpness_ratio_by_frame=per_frame("predicted sharpness", "true sharpness"),
        )


_SIDES = ("true", "predicted")


# ---------------------------------------------------------------------------------------------
# Training the network

TRAIN_SEED, HELD_OUT_SEED = 9_000, 9_001
"""Of the clips that the network learns from, and of those its figures are of: for nothing else
(but a training with seed 9, which draws from the former)."""

_POOL_FRAMES = 8
_HELD_OUT_CLIPS = 512
_STRIDES = (0, 1, 1, 1, 1, 1, 1, 2, 2, 3)  # frames between the two of a pair, drawn evenly
_BATCH = 128


@dataclass(frozen=True, kw_only=True)
class MetricCard:
    """How a metric network was trained and what it can tell, on clips of `HELD_OUT_SEED`."""

    seed: int
    clips: int
    steps: int
    gripper_px: float
    """Mean distance, in pixels of 64, between the gripper told and the true one."""
    action_px: float
    """The same of the action between the two frames."""
    frozen_action_px: float
    """Mean length of the action told of a frame and its copy, whose action is none."""
    count_error: float
    """Mean absolute error of the number of toys."""
    occupancy_r2: float
    """Share of the variance of the map of toys that is told."""
    colour_r2: float
    blur_px: float
    """Mean absolute error of the standard deviation of a blur, in pixels."""
    noise_levels: float
    """The same of noise, in grey levels."""


@dataclass(frozen=True, kw_only=True)
class _Pool:
    """Clips and what the heads must tell of them."""

    frames: Tensor  # (B, T, H, W, C) uint8
    gripper: Tensor  # (B, T, 2)
    toys: Tensor  # (B, T, n, 2)
    mask: Tensor  # (B, n)
    colour: Tensor  # (B, n, C)

    def pairs(self, clip: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Frames (M, 2, H, W, C) and targets (M, sum of the heads), all faults zero."""
        frames = torch.stack((self.frames[clip, first], self.frames[clip, second]), dim=1)
        mask = self.mask[clip].float()  # (M, n)
        at = self.toys[clip, second]
        way = (at - self.toys[clip, first]).norm(dim=-1) * mask
        # Every toy is shared out among the four cells around its centre.
        line = torch.arange(_CELLS) + 0.5
        near = (1 - (at.unsqueeze(-1) * _CELLS - line).abs()).clamp(min=0)  # (M, n, 2, cells)
        share = near[:, :, 1, :, None] * near[:, :, 0, None, :] * mask[..., None, None]
        targets = {
            "gripper": self.gripper[clip, second],
            "action": self.gripper[clip, second] - self.gripper[clip, first],
            "count": mask.sum(-1, keepdim=True),
            "motion": way.sum(-1, keepdim=True),
            "occupancy": share.sum(1).flatten(1),
            "colour": torch.einsum("mnyx,mnc->mcyx", share, self.colour[clip]).flatten(1),
            "fault": torch.zeros(len(clip), _HEADS["fault"]),
        }
        return frames, torch.cat([_encode(name, targets[name]) for name in _HEADS], dim=-1)


# Offset and factor that bring what a head tells to about zero mean and unit variance.
_CODES = {
    "gripper": (0.5, 4.0),
    "action": (0.0, 30.0),
    "count": (4.0, 1.0),
    "motion": (0.0, 20.0),
    "occupancy": (0.0, 4.0),
    "colour": (0.0, 4.0),
    "fault": (0.0, 1.0),
}


def _encode(name: str, value: Tensor) -> Tensor:
    offset, factor = _CODES[name]
    return (value - offset) * factor


def _decode(name: str, value: Tensor) -> Tensor:
    offset, factor = _CODES[name]
    return value / factor + offset


def _make_pool(seed: int, clips: int, tick: Callable[[], None] = lambda: None) -> _Pool:
    config, parts = ToyTableConfig(), []
    for first in range(0, clips, 64):
        batch = min(64, clips - first)
        made = generate(config, batch=batch, frames=_POOL_FRAMES, seed=seed, first_clip=first)
        colour = reset(config, batch=batch, seed=seed, first_clip=first).toy_colour
        parts.append((made.frames, made.gripper, made.toys, made.toy_mask, colour))
        tick()
    frames, gripper, toys, mask, colour = (torch.cat(p) for p in zip(*parts, strict=True))
    return _Pool(frames=frames, gripper=gripper, toys=toys, mask=mask, colour=colour)


def _spoil(frames: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Blur, add noise to, grey or jumble a quarter of the pairs each; also the faults (M, 4).

    `frames` is uint8 (M, 2, H, W, C); the result is float, in [0, 255].
    """
    m = len(frames)
    amount = torch.rand(m, generator=generator)
    kind = torch.arange(m) * 4 // m
    fault = torch.zeros(m, 4)
    x = frames.float()

    a = amount[kind == 0] * 2.5
    x[kind == 0] = _blur(x[kind == 0], a + 1e-3)
    fault[kind == 0, 0] = a

    a = amount[kind == 1] * 0.3
    grain = torch.randn(x[kind == 1].shape, generator=generator)
    x[kind == 1] += 255 * a[:, None, None, None, None] * grain
    fault[kind == 1, 1] = a / 0.2

    a = amount[kind == 2]
    grey = x[kind == 2].mean(-1, keepdim=True)
    x[kind == 2] += (grey - x[kind == 2]) * a[:, None, None, None, None]
    fault[kind == 2, 2] = a * 2

    a = amount[kind == 3] * 0.5
    cells = torch.rand(len(a), 1, _CELLS, _CELLS, generator=generator) < a[:, None, None, None]
    side = x.shape[2] // _CELLS
    jumbled = cells.repeat_interleave(side, 2).repeat_interleave(side, 3).unsqueeze(-1)
    shift = torch.randint(4, x.shape[2] - 4, (2,), generator=generator).tolist()
    moved = x[kind == 3].roll(shift, dims=(2, 3))
    x[kind == 3] = torch.where(jumbled, moved, x[kind == 3])
    fault[kind == 3, 3] = cells.float().mean((1, 2, 3)) * 4
    return x.clamp(0, 255), fault


def _blur(frames: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of (M, T, H, W, C), each row by its own standard deviation (M,), in pixels."""
    m, t, h, w, c = frames.shape
    reach = 7
    line = torch.arange(-reach, reach + 1)
    kernel = torch.exp(-0.5 * (line / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(-1, keepdim=True)).repeat_interleave(t * c, 0)  # (M * T * C, 15)
    x = frames.permute(0, 1, 4, 2, 3).reshape(1, m * t * c, h, w)
    x = functional.pad(x, (reach,) * 4, mode="replicate")
    x = functional.conv2d(x, kernel[:, None, :, None], groups=m * t * c)
    x = functional.conv2d(x, kernel[:, None, None, :], groups=m * t * c)
    return x.reshape(m, t, c, h, w).permute(0, 1, 3, 4, 2)


def _draw_pairs(pool: _Pool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A batch of pairs, the first half of it spoilt, and the targets."""
    clip = torch.randint(len(pool.frames), (_BATCH,), generator=generator)
    stride = torch.tensor(_STRIDES)[torch.randint(len(_STRIDES), (_BATCH,), generator=generator)]
    room = _POOL_FRAMES - stride
    first = (torch.rand(_BATCH, generator=generator) * room).long()
    frames, targets = pool.pairs(clip, first, first + stride)
    spoilt, fault = _spoil(frames[: _BATCH // 2], generator)
    targets[: _BATCH // 2, -_HEADS["fault"] :] = fault
    return torch.cat((spoilt, frames[_BATCH // 2 :].float())), targets


def train_metric_net(
    *,
    steps: int,
    clips: int = 6144,
    seed: int = TRAIN_SEED,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> tuple[MetricNet, MetricCard]:
    """Train a network and measure it; the same arguments on one machine give the same network.

    Convolutions run in bfloat16; the weights are rounded to float16, in which they are kept,
    before the features are brought to unit variance and anything is measured.

    Args:
        progress: called with what is being done, how much of it is done, and of how much.

    Raises:
        ConfigError: fewer than 1 step or fewer than 64 clips.
    """
    if steps < 1 or clips < 64:
        raise ConfigError(
            f"ToyTable metric: at least 1 step and 64 clips; got {steps} and {clips}."
        )
    made = 0

    def tick() -> None:
        nonlocal made
        made = min(made + 64, clips)
        progress("clips", made, clips)

    pool = _make_pool(seed, clips, tick)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = MetricNet()
    weight = torch.cat(
        [torch.full((size,), _HEAD_WEIGHTS[name] / size) for name, size in _HEADS.items()]
    )
    optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=2e-3, total_steps=steps + 1, pct_start=0.1
    )
    for done in range(1, steps + 1):
        pairs, targets = _draw_pairs(pool, generator)
        with torch.autocast("cpu", torch.bfloat16):
            told = net.heads(net(pairs))
        loss = ((told.float() - targets).square() * weight).sum(-1).mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        rate.step()
        progress(f"loss {float(loss.detach()):.3f}", done, steps)

    net = net.eval().requires_grad_(False)
    for tensor in (*net.parameters(), *net.buffers()):
        tensor.copy_(tensor.half())
    features = pair_features(pool.frames, net=net).flatten(0, 1)
    net.shift.copy_(features.mean(0).half())
    net.scale.copy_((1 / features.std(0)).half())
    return net, _measure(net, seed=seed, clips=clips, steps=steps)


@torch.inference_mode()
def _measure(net: MetricNet, *, seed: int, clips: int, steps: int) -> MetricCard:
    """The network's figures on held-out clips."""
    pool = _make_pool(HELD_OUT_SEED, _HELD_OUT_CLIPS)
    clip = torch.arange(len(pool.frames))
    first = clip % (_POOL_FRAMES - 1)
    frames, targets = pool.pairs(clip, first, first + 1)
    sizes = list(_HEADS.values())
    true = dict(zip(_HEADS, torch.split(targets, sizes, dim=-1), strict=True))
    told = net.readings(net(frames))
    frozen = net.readings(net(frames[:, :1].expand(-1, 2, -1, -1, -1)))
    spoilt, fault = _spoil(frames, torch.Generator().manual_seed(HELD_OUT_SEED))
    wrong = (net.readings(net(spoilt))["fault"] - fault).abs()
    quarter = len(clip) // 4

    def value(name: str, readings: dict[str, Tensor]) -> Tensor:
        return _decode(name, readings[name])

    def distance(name: str) -> float:
        return float((value(name, told) - value(name, true)).norm(dim=-1).mean()) * METRIC_SIZE

    def explained(name: str) -> float:
        spread = (true[name] - true[name].mean(0)).square().sum()
        return 1 - float((told[name] - true[name]).square().sum() / spread)

    return MetricCard(
        seed=seed,
        clips=clips,
        steps=steps,
        gripper_px=distance("gripper"),
        action_px=distance("action"),
        frozen_action_px=float(value("action", frozen).norm(dim=-1).mean()) * METRIC_SIZE,
        count_error=float((told["count"] - true["count"]).abs().mean()),
        occupancy_r2=explained("occupancy"),
        colour_r2=explained("colour"),
        blur_px=float(wrong[:quarter, 0].mean()),
        noise_levels=float(wrong[quarter : 2 * quarter, 1].mean()) * 0.2 * 255,
    )


# ---------------------------------------------------------------------------------------------
# The command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__.split("\n")[0])


@app.callback()
def _group() -> None:
    """Keeps `train` a subcommand."""


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Safetensors file to write.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 6000,
    clips: Annotated[int, typer.Option(min=64, help="ToyTable clips to learn from.")] = 6144,
    seed: Annotated[int, typer.Option(help="Of clips, weights and order.")] = TRAIN_SEED,
) -> None:
    """Train the network of the ToyTable metric on the CPU."""
    if seed == HELD_OUT_SEED:
        raise ConfigError(f"seed {seed} is of the held-out clips; take another")
    check_writable(out)
    with stderr_bar() as bar:
        task = bar.add_task("", total=None)
        net, card = train_metric_net(
            steps=steps, clips=clips, seed=seed,
            progress=lambda what, done, total: bar.update(
                task, description=what, completed=done, total=total
            ),
        )  # fmt: skip
    tensors = {name: tensor.half().contiguous() for name, tensor in net.state_dict().items()}
    with replacing(out) as temporary:
        save_file(tensors, temporary, metadata={"card": json.dumps(asdict(card))})
    print(json.dumps(asdict(card), indent=2))


if __name__ == "__main__":
    run_command(app)
