"""Continue a real clip: read it, roll out, write a video and a contact sheet."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from canvasmar_rt.config import ModelConfig, SamplingConfig
from canvasmar_rt.contact_sheet import contact_sheet, heatmap
from canvasmar_rt.errors import InputError
from canvasmar_rt.rollout import Prediction, Predictor
from canvasmar_rt.video import Clip, read_clip, write_clip, write_png

UInt8 = npt.NDArray[np.uint8]

SHEET_COLUMNS = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """What `canvasmar-rt predict` can choose. Frame counts are pixel frames; `fps` is the rate at
    which the clip is sampled and the output plays, the model's own if None."""

    frames: int = 16
    context: int = 5
    seed: int = 0
    batch: int = 1
    fps: float | None = None
    start: float = 0.0
    actions: bool = False
    sampling: SamplingConfig | None = None


def context_length(config: ModelConfig, wanted: int) -> int:
    """The longest context of at most `wanted` pixel frames the model takes: 1 + n*t.

    Raises:
        InputError: if `wanted` is below 1.
    """
    t = config.autoencoder.temporal_compression
    if wanted < 1:
        raise InputError(f"context: at least 1 frame is needed, got {wanted}")
    return (wanted - 1) // t * t + 1


def predict_clip(
    predictor: Predictor,
    source: Path,
    output: Path,
    options: PredictOptions,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Predict how the clip at `source` goes on, `options.batch` futures side by side.

    Writes `output` (.mp4, .gif or .png frames: context, then prediction) and a contact sheet
    `<stem>_sheet.png` beside it.

    Args:
        progress: called with the latent frames done and in all.

    Returns:
        A JSON-ready summary: files written, frame counts, seconds per latent frame.

    Raises:
        VideoError: the clip cannot be read, is too short, or the output cannot be written.
        InputError: options the model cannot run.
    """
    config = predictor.config
    ae, t = config.autoencoder, config.autoencoder.temporal_compression
    if options.frames < 1:
        raise InputError(f"frames: at least 1 is needed, got {options.frames}")
    length = context_length(config, options.context)
    rate = config.fps if options.fps is None else options.fps
    clip = read_clip(
        source,
        size=(ae.height, ae.width),
        fps=rate,
        start=options.start,
        max_frames=length + options.frames,
        min_frames=length,
    )
    context = clip.frames[:length]
    steps = math.ceil(options.frames / t)
    told = _actions(source, config, (length - 1) // t + steps) if options.actions else None
    begun = time.perf_counter()
    known = (length - 1) // t
    rollout = predictor.start(
        context,
        seed=options.seed,
        batch=options.batch,
        sampling=options.sampling,
        actions=None if told is None else told[:known],
    )
    context_seconds = time.perf_counter() - begun
    predictions: list[Prediction] = []
    for i in range(steps):
        action = None if told is None else told[known + i]
        predictions.append(rollout.step(action, decode_canvas=True))
        progress(i + 1, steps)
    predicted = np.concatenate([p.frames for p in predictions], axis=1)[:, : options.frames]
    videos = [np.concatenate([context, future]) for future in predicted]
    written = write_clip(output, np.concatenate(videos, axis=2), rate)
    sheet = output.with_name(f"{output.stem}_sheet.png")
    write_png(sheet, _sheet(clip, context, predicted, predictions, t))
    seconds = sorted(p.timings["total"] for p in predictions)
    return {
        "source": str(source),
        "output": [str(path) for path in written],
        "sheet": str(sheet),
        "model": config.name,
        "engine": predictor.engine.name,
        "device": predictor.engine.device,
        "seed": options.seed,
        "batch": options.batch,
        "fps": rate,
        "context_frames": length,
        "predicted_frames": options.frames,
        "latent_frames": steps,
        "notes": list(clip.notes),
        "context_seconds": round(context_seconds, 4),
        "seconds_per_latent_frame": round(seconds[len(seconds) // 2], 4),
    }


def _actions(source: Path, config: ModelConfig, latents: int) -> npt.NDArray[np.float32]:
    """Actions (latents, A) stored in an .npz beside its frames, as one row a latent frame or one
    row a pixel frame (t of them make one latent frame's action)."""
    if not config.action_dim:
        raise InputError(f"actions: model {config.name} takes none; leave --actions out")
    if source.suffix != ".npz":
        raise InputError(f"{source}: actions come from an .npz with an array named 'actions'")
    with np.load(source, allow_pickle=False) as archive:
        if "actions" not in archive:
            raise InputError(f"{source}: no array named 'actions', only {sorted(archive.files)}")
        rows = np.asarray(archive["actions"], np.float32)
    t = config.autoencoder.temporal_compression
    if rows.ndim == 2 and rows.shape[1] * t == config.action_dim:
        rows = rows[: len(rows) // t * t].reshape(-1, config.action_dim)
    if rows.ndim != 2 or rows.shape[1] != config.action_dim or len(rows) < latents:
        raise InputError(
            f"{source}: actions have shape {rows.shape}, expected at least ({latents}, "
            f"{config.action_dim}) or ({latents * t}, {config.action_dim / t:g})"
        )
    return rows


def _sheet(
    clip: Clip, context: UInt8, predicted: UInt8, predictions: list[Prediction], t: int
) -> UInt8:
    """Rows: what really happened, each future, its canvas and staticness; columns: time."""
    length, future = len(context), predicted.shape[1]
    shown = _columns(length, future)
    real: list[UInt8 | None] = [
        clip.frames[i] if i < len(clip.frames) else None for i in range(length + future)
    ]
    rows: list[tuple[str, list[UInt8 | None]]] = [("real", [real[i] for i in shown])]
    for b, frames in enumerate(predicted):
        label = "prediction" if len(predicted) == 1 else f"future {b + 1}"
        video = [*context, *frames]
        rows.append((label, [video[i] for i in shown]))
    canvas: list[UInt8 | None] = [None] * length
    still: list[UInt8 | None] = [None] * length
    for p in predictions:
        size = (p.frames.shape[2], p.frames.shape[3])
        canvas += [None] * t if p.canvas_frames is None else list(p.canvas_frames[0])
        still += [None] * t if p.staticness is None else [heatmap(p.staticness[0], size)] * t
    rows.append(("canvas", [canvas[i] for i in shown]))
    rows.append(("staticness", [still[i] for i in shown]))
    titles = [f"{i - length + 1:+d}" if i >= length else f"context {i - length + 1}" for i in shown]
    return contact_sheet(rows, columns=titles)


def _columns(length: int, future: int) -> list[int]:
    """Frames that fit on a sheet: the last of the context, then the future evenly spaced."""
    before = min(length, 3)
    count = min(future, SHEET_COLUMNS - before)
    picked = np.unique(np.linspace(0, future - 1, count).round().astype(int))
    return [*range(length - before, length), *(length + int(i) for i in picked)]
