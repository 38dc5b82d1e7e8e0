"""The papers' protocols on their data: readers, the reference sampler and the metrics together.

Notation: B clips, T pixel frames, t pixel frames per latent frame, H rows, W columns. Clips are
uint8 (B, T, H, W, 3) RGB.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from canvasmar_rt.config import SamplingConfig
from canvasmar_rt.errors import ConfigError, InputError
from canvasmar_rt.models.canvasmar import FrameModel
from training.clips import Clips
from training.datasets import RecordedClips
from training.metrics import (
    Features,
    Lpips,
    Protocol,
    at_resolution,
    psnr,
    run_protocol,
    ssim,
)
from training.stages import continue_clips

_MOST_PSNR = 100.0  # dB: a frame met exactly, such as a black one, must not make a mean infinite


def context_frames(model: FrameModel, frames: int) -> int:
    """Latent frames of a context of pixel frames.

    Raises:
        InputError: if it is not 1 + n*t frames long.
    """
    t = model.config.autoencoder.temporal_compression
    if frames < 1 or (frames - 1) % t:
        raise InputError(f"a context of {frames} frames: the model takes 1 + n*{t}")
    return 1 + (frames - 1) // t


def predict_frames(
    model: FrameModel,
    sampling: SamplingConfig,
    context: Tensor,
    frames: int,
    *,
    seed: int,
    first_stream: int = 0,
) -> Tensor:
    """The `frames` pixel frames that follow a context of 1 + n*t, without actions; latent frames
    are predicted whole and the last one cut. Clip i draws from stream `first_stream` + i.

    Raises:
        InputError: if the context is not whole latent frames.
    """
    given, t = context.shape[1], model.config.autoencoder.temporal_compression
    latent = context_frames(model, given)
    ahead = -(-frames // t) * t
    unknown = context.new_zeros(len(context), ahead, *context.shape[2:])  # a length, never read
    clips = Clips(frames=torch.cat([context, unknown], dim=1), actions=None)
    shown = continue_clips(
        model, sampling, clips, context=latent, seed=seed, first_stream=first_stream
    )
    return shown.frames[:, given : given + frames]


class _Places(Sequence[Tensor]):
    """The clips of a protocol, (T, H, W, 3) each, read in blocks as they are asked for in order and
    kept until `forget`."""

    def __init__(self, read: Callable[[int, int], Tensor], count: int, block: int) -> None:
        self._read, self._count, self._block = read, count, block
        self._kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if index not in self._kept:
            clips = self._read(index, min(self._block, self._count - index))
            self._kept.update(enumerate(clips, start=index))
        return self._kept[index]

    def forget(self, before: int) -> None:
        """Let go of the clips before this one."""
        for index in [i for i in self._kept if i < before]:
            del self._kept[index]


def measure_protocol(
    model: FrameModel,
    sampling: SamplingConfig,
    protocol: Protocol,
    source: RecordedClips,
    features: Features,
    *,
    lpips: Lpips | None = None,
    clips: int | None = None,
    samples: int | None = None,
    batch: int = 16,
    seed: int = 0,
    usual: bool = True,
    tick: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """FVD by a protocol, with PSNR, SSIM and LPIPS of the same predictions.

    The source cuts the places: the beginning of each recording in order, or pass after pass of
    windows at random (see `training.datasets`), so a recording that is broken or too short is
    left out or replaced. The figures beside the FVD are at the protocol's resolution, each the mean
    over the frames of a prediction, then over all predictions (`mean`) and, where a place has
    several, over the best of each place (`best`). The PSNR of a frame counts at most 100 dB.

    Args:
        source: clips of `conditioning + predicted` frames in the model's size.
        clips, samples: fewer places, another number of predictions of each: not the protocol's
            figure, and `whole_protocol` says so, as where a recording of the data set is missing
            or cannot be read.
        usual: whether the source is the protocol's data set, its test split, read as is usual.

    Raises:
        InputError: clips of another size, or a context the model cannot take.
        ConfigError: more clips than the protocol has.
    """
    context_frames(model, protocol.conditioning)
    span, ae = protocol.conditioning + protocol.predicted, model.config.autoencoder
    if (source.frames, source.height, source.width) != (span, ae.height, ae.width):
        raise InputError(
            f"protocol {protocol.name}: expected clips of {span} frames of {ae.height}x{ae.width}, "
            f"got {source.frames} of {source.height}x{source.width}"
        )
    whole = (protocol.videos or len(source)) * protocol.places
    if clips is not None and clips > whole:
        raise ConfigError(
            f"protocol {protocol.name} has {whole} clips here, {clips} were asked for"
        )
    wanted, drawn = clips or whole, samples or protocol.samples

    if protocol.start == "first":
        parts, found = [], 0
        for part in source.test_clips(batch):
            parts.append(part.frames)
            found += len(part.frames)
            if found >= wanted:
                break
        beginnings = torch.cat(parts)[:wanted]
        places = _Places(lambda i, n: beginnings[i : i + n], len(beginnings), batch)
    else:
        places = _Places(lambda i, n: source.clips(i, n).frames, wanted, batch)

    measures: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "psnr_db": lambda real, made: psnr(real, made).clamp(max=_MOST_PSNR),
        "ssim": ssim,
    }
    if lpips is not None:
        measures["lpips"] = lpips
    scores: dict[str, list[Tensor]] = {name: [] for name in measures}

    def generate(context: Tensor, frames: int, streams: Sequence[int]) -> Tensor:
        assert list(streams) == list(range(streams[0], streams[0] + len(context)))
        made = predict_frames(model, sampling, context, frames, seed=seed, first_stream=streams[0])
        real = torch.stack([places[s // drawn][protocol.conditioning :] for s in streams])
        pair = at_resolution(real, protocol.resolution), at_resolution(made, protocol.resolution)
        for name, measure in measures.items():
            scores[name].append(measure(*pair).double().mean(1))
        places.forget(streams[-1] // drawn)
        tick(len(context))
        return made

    result = run_protocol(
        dataclasses.replace(protocol, samples=drawn), places, generate, features, seed=seed,
        batch=batch,
    )  # fmt: skip
    report = dataclasses.asdict(result) | {
        "whole_protocol": usual
        and protocol.recordings in (None, len(source))
        and clips in (None, whole)
        and len(places) == whole
        and drawn == protocol.samples
        and not source.skipped,
        "conditioning": protocol.conditioning,
        "predicted": protocol.predicted,
        "resolution": protocol.resolution,
        "recordings": len(source),
        "autocast": "bfloat16",  # as `continue_clips` samples
        "skipped_recordings": len(source.skipped),
    }
    for name, gathered in scores.items():
        values = torch.cat(gathered).reshape(len(places), drawn)
        report[name] = {"mean": float(values.mean())}
        if drawn > 1:
            best = values.amin(1) if name == "lpips" else values.amax(1)
            report[name]["best"] = float(best.mean())
    return report
