"""Continue a real clip: read it, roll out, write a video and a contact sheet."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from canvasmar_rt._video_common import ARCHIVE_SUFFIXES
from canvasmar_rt._video_streams import frame_stamps
from canvasmar_rt._video_writing import check_target
from canvasmar_rt.actions import find_actions, read_actions
from canvasmar_rt.config import ModelConfig, SamplingConfig
from canvasmar_rt.contact_sheet import contact_sheet, heatmap
from canvasmar_rt.errors import InputError
from canvasmar_rt.rollout import Prediction, Predictor
from canvasmar_rt.video import (
    IMAGE_SUFFIXES,
    MAX_CLIP_BYTES,
    MAX_CLIP_FRAMES,
    Clip,
    read_clip,
    write_clip,
    write_png,
)

UInt8 = npt.NDArray[np.uint8]

OUTPUT_SUFFIXES = (".mp4", ".gif", ".png")
SHEET_COLUMNS = 12
SHEET_HEIGHT = 12_000
"""Pixels of a sheet, about: more futures than that are not on it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """What `canvasmar-rt predict` can choose. Frame counts are pixel frames; `fps` is the rate at
    which the clip is sampled and the output plays, the model's own if None. With `actions` every
    frame of the clip is taken."""

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


def video_names(clips: Sequence[Path], output: Path) -> dict[Path, Path]:
    """Each clip's video in the folder `output`: named after it, with its suffix where two would
    have the same name, and all with theirs where that is again the name of another.

    Raises:
        InputError: if `output` is no folder that can be written to, and cannot become one, or is
            where the clips lie (a single one may lie there under another name).
    """
    _check_folder(output.absolute(), output)
    # without case, which Windows and macOS do not tell apart
    stems = [clip.stem.casefold() for clip in clips]
    names = [clip.stem if stems.count(clip.stem.casefold()) == 1 else clip.name for clip in clips]
    if len({name.casefold() for name in names}) < len(clips):
        names = [clip.name for clip in clips]
    videos = {clip: output / f"{name}.mp4" for clip, name in zip(clips, names, strict=True)}
    given = {clip.resolve() for clip in clips}
    folders = {folder for c in clips for folder in (c.parent, c.resolve().parent)}
    if len(clips) > 1 and output.suffix.lower() in OUTPUT_SUFFIXES and not output.is_dir():
        raise InputError(f"{output}: {len(clips)} clips make as many videos; give -o a folder")
    among = len(clips) > 1 and any(_same(output, folder) for folder in folders)
    if among or any(video.resolve() in given for video in videos.values()):
        raise InputError(f"{output}: the clips themselves lie there; give another folder")
    return videos


def predict_clip(
    predictor: Predictor,
    source: Path,
    output: Path,
    options: PredictOptions,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Predict how the clip at `source` goes on, `options.batch` futures side by side.

    Writes `output` (.mp4 or .gif: context, then prediction; for `NAME.png`, numbered frames in a
    folder `NAME`) and a contact sheet `<stem>_sheet.png` beside it.

    Args:
        progress: called with the latent frames done and in all.

    Returns:
        A JSON-ready summary: files written, frame counts, seconds per latent frame.

    Raises:
        VideoError: the clip cannot be read, is too short, or the output cannot be written.
        InputError: options the model cannot run, or an output that is a source, would lie among
            its frames, or is a directory.
    """
    config = predictor.config
    ae, t = config.autoencoder, config.autoencoder.temporal_compression
    if options.frames < 1:
        raise InputError(f"frames: at least 1 is needed, got {options.frames}")
    pixels = options.frames * options.batch * ae.height * ae.width * 3
    if options.frames > MAX_CLIP_FRAMES or pixels > MAX_CLIP_BYTES:
        raise InputError(f"frames: {options.frames} at batch {options.batch} are too many to hold")
    if options.context > MAX_CLIP_FRAMES:
        raise InputError(f"context: {options.context} frames are too many to hold")
    length = context_length(config, options.context)
    rate = config.fps if options.fps is None else options.fps
    output, sheet = _targets(source, output, length + options.frames, rate)
    if options.actions and (options.start or rate != config.fps):
        raise InputError("actions: they belong to every frame from the first; leave out start, fps")
    # actions belong to frames as they were recorded
    untimed = source.is_dir() or source.suffix.lower() in IMAGE_SUFFIXES | ARCHIVE_SUFFIXES
    recorded = options.actions and not untimed
    clip = read_clip(
        source,
        size=(ae.height, ae.width),
        fps=None if recorded else rate,
        start=options.start,
        max_frames=length + options.frames,
        min_frames=length,
    )
    notes = list(clip.notes)
    if options.actions and clip.skipped:
        raise InputError(f"{source}: damaged frames; which action is whose is unknown")
    if recorded and abs(clip.fps - rate) > 0.01 * rate:
        notes.append(
            f"recorded at {clip.fps:g} fps, the model's is {rate:g}: with its actions every frame "
            "is taken"
        )
    if config.action_dim and not options.actions and find_actions(source):
        notes.append("the clip's actions are not used; --actions predicts under them")
    sampling = options.sampling or predictor.sampling
    if config.action_dim and not options.actions and sampling.ar_steps == 1:
        notes.append("without actions the future is open, and one AR step blurs it: try --steps 4")
    if options.batch > (most := _shown_futures(ae.height)):
        notes.append(f"the sheet shows the first {most} futures")
    if length != options.context:
        notes.append(
            f"the context is {length} frames, not {options.context}: the model takes 1 + n*{t}"
        )
    context = clip.frames[:length]
    steps, group = math.ceil(options.frames / config.step_frames), config.group
    known = (length - 1) // t
    told = None
    if options.actions:
        table = read_latent_actions(source, config, known + math.ceil(options.frames / t))
        if recorded:
            _check_recorded(source, table)
        if table.row_frames > 1:
            notes.append(
                f"its {table.rows} rows of {table.latent.shape[1]} actions are taken as one a "
                f"latent frame, of {t} pixel frames"
            )
        # of the last group only the first frames may be asked for
        told = np.pad(table.latent, ((0, group - 1), (0, 0)))
    begun = time.perf_counter()
    rollout = predictor.start(
        context,
        seed=options.seed,
        batch=options.batch,
        sampling=options.sampling,
        actions=None if told is None or group > 1 else told[:known],
    )
    context_seconds = time.perf_counter() - begun
    predictions: list[Prediction] = []
    for i in range(steps):
        action = None if told is None else told[known + i * group :][:group].reshape(-1)
        predictions.append(rollout.step(action, decode_canvas=True))
        progress((i + 1) * group, steps * group)
    predicted = np.concatenate([p.frames for p in predictions], axis=1)[:, : options.frames]
    videos = [np.concatenate([context, future]) for future in predicted]
    written = write_clip(output, np.concatenate(videos, axis=2), rate)
    write_png(sheet, _sheet(clip, context, predicted, predictions, t))
    seconds = sorted(p.timings["total"] for p in predictions)
    return {
        "source": str(source),
        "output": [str(path) for path in written],
        "sheet": str(sheet),
        "model": config.name,
        "bundle": predictor.bundle.path.name,
        "ar_steps": sampling.ar_steps,
        "flow_steps": sampling.flow_steps,
        "engine": predictor.engine.name,
        "device": predictor.engine.device,
        "seed": options.seed,
        "batch": options.batch,
        "fps": rate,
        "context_frames": length,
        "predicted_frames": options.frames,
        "latent_frames": steps * group,
        "notes": notes,
        "context_seconds": round(context_seconds, 4),
        "seconds_per_latent_frame": round(seconds[len(seconds) // 2] / group, 4),
    }


def _check_folder(folder: Path, output: Path) -> None:
    """See that files can be made in `folder`, which may be still to be made."""
    there = next(p for p in (folder, *folder.parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"{output}: {there} is not a folder that can be written to")


def _same(a: Path, b: Path) -> bool:
    """Whether two paths are of one thing that is there. Their names do not tell: on Windows and
    macOS they may differ in case."""
    return os.path.exists(a) and os.path.exists(b) and os.path.samefile(a, b)


def _targets(source: Path, output: Path, count: int, fps: float) -> tuple[Path, Path]:
    """Where the video of `count` frames and the sheet go, checked before anything is computed."""
    suffix = output.suffix.lower()
    if suffix not in OUTPUT_SUFFIXES:
        raise InputError(f"{output}: the output is an .mp4, a .gif, or a .png for numbered frames")
    sheet = output.with_name(f"{output.stem}_sheet.png")
    for path in (output, sheet):
        try:
            taken = path.is_dir()
        except OSError as error:  # of a folder of clips one name may be too long, with its ending
            raise InputError(f"{path}: cannot be written ({error.strerror})") from None
        if taken:
            raise InputError(f"{path}: is a directory; name a file in it")
        if _same(path, source):
            raise InputError(f"{path}: is the clip itself; give another output")
    _check_folder(output.absolute().parent, output)
    if suffix == ".png":  # frames by themselves, so that the folder is a clip again
        output = output.with_suffix("") / output.name
    frames, pictures = source, [output, sheet]  # where the clip's are, and what may lie among them
    if not source.is_dir():
        frames, numbered = source.parent, source.suffix.lower() in IMAGE_SUFFIXES
        pictures = [output] if numbered and suffix == ".png" else []
    for path in pictures:
        if _same(path.parent, frames):
            raise InputError(f"{path}: would lie among the clip's own frames; give another output")
    check_target(output, count, fps)
    return output, sheet


def _check_recorded(source: Path, table: LatentActions) -> None:
    """See that a video has no fewer frames than rows of actions."""
    frames = len(frame_stamps(source, exact=True)[0])
    if table.row_frames * table.rows >= frames + table.row_frames:
        raise InputError(
            f"{source}: {table.rows} rows of actions for {frames} frames; if frames are missing, "
            "which action is whose is unknown: copy the video again, or cut the table"
        )


class LatentActions(NamedTuple):
    """Of a clip: `latent` (latents or more, A/J) float32, and how they are stored: so many `rows`,
    each of `row_frames` pixel frames (1, or t)."""

    latent: npt.NDArray[np.float32]
    rows: int
    row_frames: int


def read_latent_actions(source: Path, config: ModelConfig, latents: int) -> LatentActions:
    """A clip's own actions, stored as one row a latent frame or one row a pixel frame (t of them
    make one latent frame's action).

    Raises:
        InputError: if the model takes none, or they cannot be had or do not fit it.
    """
    if not config.action_dim:
        raise InputError(f"actions: model {config.name} takes none; leave --actions out")
    rows = read_actions(source)
    t, size = config.autoencoder.temporal_compression, config.action_dim // config.group
    found = rows.shape
    row_frames = 1 if found[1] * t == size else t  # of t = 1 it is 1 whatever they have
    if found[1] * t == size:
        rows = rows[: len(rows) // t * t].reshape(-1, size)
    if rows.shape[1] != size:
        wanted = f"({latents}, {size})"
        if t > 1 and size % t == 0:  # else no row of a pixel frame makes up that of a latent frame
            wanted += f" or ({latents * t}, {size // t})"
        raise InputError(f"{source}: actions have shape {found}, expected at least {wanted}")
    if len(rows) < latents:
        raise InputError(
            f"{source}: its actions lead to {1 + t * len(rows)} frames, context and prediction "
            f"want {1 + t * latents}; ask for fewer frames"
        )
    return LatentActions(rows, found[0], row_frames)


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
    for b, frames in enumerate(predicted[: _shown_futures(predicted.shape[2])]):
        label = "prediction" if len(predicted) == 1 else f"future {b + 1}"
        video = [*context, *frames]
        rows.append((label, [video[i] for i in shown]))
    canvas: list[UInt8 | None] = [None] * length
    still: list[UInt8 | None] = [None] * length
    for p in predictions:
        size = (p.frames.shape[2], p.frames.shape[3])
        frames_of_step = p.frames.shape[1]
        canvas += [None] * frames_of_step if p.canvas_frames is None else list(p.canvas_frames[0])
        if p.staticness is None:
            still += [None] * frames_of_step
        else:
            maps = p.staticness[0].reshape(-1, *p.staticness.shape[-2:])
            still += [heatmap(each, size) for each in maps for _ in range(t)]
    of = "" if len(predicted) == 1 else " 1"
    rows.append((f"canvas{of}", [canvas[i] for i in shown]))
    rows.append((f"staticness{of}", [still[i] for i in shown]))
    titles = [f"{i - length + 1:+d}" if i >= length else f"context {i - length + 1}" for i in shown]
    return contact_sheet(rows, columns=titles)


def _shown_futures(height: int) -> int:
    """How many futures of frames so high are on a sheet."""
    return max(1, SHEET_HEIGHT // max(192, height) - 3)


def _columns(length: int, future: int) -> list[int]:
    """Frames that fit on a sheet: the last of the context, then the future evenly spaced."""
    before = min(length, 3)
    count = min(future, SHEET_COLUMNS - before)
    picked = np.unique(np.linspace(0, future - 1, count).round().astype(int))
    return [*range(length - before, length), *(length + int(i) for i in picked)]
