"""Clips in and out: video files, folders of frames and NumPy archives, as uint8 RGB arrays.

Notation: T frames, H rows, W columns; a frame is (H, W, 3) RGB, 0..255.

What is decided here, once for the whole library:
  - time 0 is the first frame of the file, whatever time stamp the file gives it;
  - pictures come upright (display matrix, EXIF), transparency lies over black, any bit depth,
    colour matrix and range becomes 8-bit full-range RGB; high dynamic range is not tone-mapped;
  - pixels are taken as square: a stated pixel aspect is ignored, as the datasets' own loaders do;
  - archives and folders carry no clock: their frames are numbered at the rate asked for.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
from PIL import Image

from canvasmar_rt._video_archives import (
    array_frames,
    array_header,
    listing,
    open_member,
    picture_at,
    untimed,
)
from canvasmar_rt._video_common import (
    ARRAY_KEYS,
    CLIP_SUFFIXES,
    IMAGE_SUFFIXES,
    MAX_CLIP_BYTES,
    MAX_CLIP_FRAMES,
    MAX_SIDE,
    PARSER_ERRORS,
    UNSTATED_FPS,
    UNTIMED_FPS,
    VIDEO_SUFFIXES,
    PathLike,
    Pixels,
    Shown,
    Track,
    brief,
    check_pixels,
)
from canvasmar_rt._video_streams import open_video
from canvasmar_rt._video_writing import write_clip, write_png
from canvasmar_rt.errors import VideoError

__all__ = [
    "ARRAY_KEYS",
    "CLIP_SUFFIXES",
    "IMAGE_SUFFIXES",
    "MAX_CLIP_BYTES",
    "MAX_CLIP_FRAMES",
    "MAX_SIDE",
    "UNSTATED_FPS",
    "UNTIMED_FPS",
    "VIDEO_SUFFIXES",
    "Clip",
    "PathLike",
    "Pixels",
    "find_clips",
    "fit",
    "read_clip",
    "write_clip",
    "write_png",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class Clip:
    """Frames of one source in order, with the rate at which they follow each other.

    Attributes:
        frames: (T, H, W, 3) uint8 RGB.
        fps: frames per second of `frames`; the average where the source's rate varies.
        source: the path the clip was read from.
        skipped: damaged packets and frames that were left out.
        notes: one line for each thing a person should know (damage, an assumed rate).
    """

    frames: Pixels
    fps: float
    source: str
    skipped: int = 0
    notes: tuple[str, ...] = ()


def read_clip(
    path: PathLike,
    *,
    size: tuple[int, int] | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    start: float = 0.0,
    min_frames: int = 1,
    key: str | None = None,
) -> Clip:
    """Read a video file, an image, a folder of frames or an .npz/.npy archive.

    Frames are decoded one by one and only as far as needed.

    Args:
        size: (height, width) each frame is cropped and resized to; see `fit`.
        fps: sample by time: output frame k is the one on screen at `start + k / fps`, so frames
            repeat or drop out where the source is slower or faster. None takes every frame.
        max_frames: stop after this many.
        start: seconds from the first frame; the frame then on screen is the first one taken.
        min_frames: fewer than this is an error.
        key: name of the array in an .npz; by default the first of `ARRAY_KEYS` that holds
            pictures, else the only array shaped (T, H, W, 3).

    Raises:
        VideoError: the source is missing, damaged, empty, too short or too large.
    """
    source = Path(path)
    _check_request(source, size, fps, max_frames, start, min_frames)
    try:
        with _open(source, fps, start, key) as track:
            picked = _in_order(track, start) if fps is None else _by_time(track, fps, start)
            frames = _collect(source, islice(picked, max_frames), size)
    except VideoError:
        raise
    except PARSER_ERRORS as error:
        raise VideoError(
            f"{source}: expected a video, an image or an .npz/.npy archive, but it cannot be"
            f" decoded ({brief(error)}); the file is damaged, cut short or of another kind"
        ) from error
    if len(frames) < min_frames:
        asked = "".join(
            [f" at {fps:g} fps" if fps else "", f" from {start:g} s on" if start else ""]
        )
        damage = f" ({track.skipped} damaged packets were skipped)" if track.skipped else ""
        raise VideoError(
            f"{source}: expected at least {_count(min_frames)}{asked}, got {len(frames)}{damage};"
            " give a longer clip, an earlier start or a shorter context"
        )
    return Clip(
        frames=np.stack(frames),
        fps=track.fps if fps is None else float(fps),
        source=str(source),
        skipped=track.skipped,
        notes=tuple(track.notes),
    )


def find_clips(path: PathLike) -> list[Path]:
    """List what `read_clip` should be given for `path`, in natural order.

    A file is itself; a folder of images is one clip; a folder of videos or archives is each of
    them. Hidden files, sub-folders and files of other kinds are passed over.

    Raises:
        VideoError: nothing is there, or frames and videos lie side by side.
    """
    source = Path(path)
    _check_there(source)
    if not source.is_dir():
        return [source]
    images, clips = listing(source)
    if images and clips:
        raise VideoError(
            f"{source}: expected either image frames of one clip or video files, found both"
            f" ({images[0].name}, {clips[0].name}, ..); put them into folders of their own"
        )
    if not images and not clips:
        raise VideoError(
            f"{source}: expected video files, .npz/.npy archives or image frames, found none;"
            " give a file, or the folder that holds them directly"
        )
    return [source] if images else clips


def fit(frames: Pixels, size: tuple[int, int]) -> Pixels:
    """Crop the centre to the aspect of `size` (height, width) and resize it with Lanczos.

    `frames` is (T, H, W, 3) or (H, W, 3) uint8, and comes back as it is when it has that size.
    The crop starts on a whole pixel, so that a crop without resizing is exact.

    Raises:
        VideoError: the frames are not uint8 RGB, or the size is out of range.
    """
    height, width = _checked_size("fit", size)
    check_pixels("fit", frames, ranks=(3, 4))
    h, w = frames.shape[-3:-1]
    if (h, w) == (height, width):
        return frames
    if frames.ndim == 4:
        return np.stack([fit(frame, size) for frame in frames])
    crop_h, crop_w = float(h), float(w)
    if w * height > h * width:
        crop_w = h * width / height
    else:
        crop_h = w * height / width
    top, left = int((h - crop_h) / 2), int((w - crop_w) / 2)
    box = (left, top, min(left + crop_w, w), min(top + crop_h, h))
    image = Image.fromarray(np.ascontiguousarray(frames))
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box=box)).copy()


def _check_request(
    source: Path,
    size: tuple[int, int] | None,
    fps: float | None,
    max_frames: int | None,
    start: float,
    min_frames: int,
) -> None:
    if size is not None:
        _checked_size(str(source), size)
    if fps is not None and not (math.isfinite(fps) and 0 < fps <= 1000):
        raise VideoError(f"{source}: fps must be above 0 and at most 1000, got {fps}")
    if not (math.isfinite(start) and start >= 0):
        raise VideoError(f"{source}: start must be 0 or more seconds, got {start}")
    if min_frames < 1 or (max_frames is not None and max_frames < min_frames):
        raise VideoError(
            f"{source}: expected 1 <= min_frames <= max_frames,"
            f" got min_frames {min_frames}, max_frames {max_frames}"
        )


def _check_there(source: Path) -> None:
    try:
        there, usable = source.exists(), source.is_dir() or source.is_file()
    except OSError as error:
        raise VideoError(f"{source}: no path of this system ({brief(error)})") from None
    if not there:
        raise VideoError(f"{source}: no such file or folder; check the path")
    if not usable:
        raise VideoError(f"{source}: expected a file or a folder, got a device, pipe or socket")


@contextmanager
def _open(source: Path, fps: float | None, start: float, key: str | None) -> Iterator[Track]:
    _check_there(source)
    if source.is_file() and source.stat().st_size == 0:
        raise VideoError(f"{source}: the file is empty (0 bytes); copy or download it again")
    suffix = source.suffix.lower()
    if key is not None and suffix != ".npz":
        raise VideoError(f"{source}: key={key!r} names an array of an .npz, this is no .npz")
    if source.is_dir():
        images, _ = listing(source)
        if not images:
            raise VideoError(
                f"{source}: expected a folder of image frames"
                f" ({', '.join(sorted(IMAGE_SUFFIXES))}), found none in it"
            )
        yield untimed((picture_at(image) for image in images), fps)
    elif suffix in IMAGE_SUFFIXES:
        yield untimed(iter([picture_at(source)]), fps)
    elif suffix == ".npz":
        with (
            zipfile.ZipFile(source) as archive,
            open_member(source, archive, key) as (header, file, have),
        ):
            yield untimed(array_frames(source, header, file, have), fps)
    elif suffix == ".npy":
        with source.open("rb") as file:
            header = array_header(source, source.name, file)
            have = source.stat().st_size - file.tell()
            yield untimed(array_frames(source, header, file, have), fps)
    else:
        with open_video(source, timed=fps is not None or start > 0, start=start) as track:
            yield track


def _in_order(track: Track, start: float) -> Iterator[Pixels]:
    """Every frame, from the one on screen at `start`."""
    first = 0.0
    for count, shown in enumerate(_from(track, start), 1):
        first = shown.time if count == 1 else first
        if track.measured and shown.end > first:
            track.fps = count / (shown.end - first)
        yield shown.pixels()


def _from(track: Track, start: float) -> Iterator[Shown]:
    if start == 0:
        yield from track.shown
        return
    before: Shown | None = None
    for now in chain(track.shown, (None,)):
        if before is not None:
            until = before.end if now is None else now.time
            if until - track.slack > start:
                yield before
        before = now


def _by_time(track: Track, fps: float, start: float) -> Iterator[Pixels]:
    """The frame on screen at each instant `start + k / fps`."""
    k = 0
    before: Shown | None = None
    for now in chain(track.shown, (None,)):
        if before is not None:
            until = (before.end if now is None else now.time) - track.slack
            pixels: Pixels | None = None
            while start + k / fps < until:
                pixels = before.pixels() if pixels is None else pixels
                yield pixels
                k += 1
        before = now


def _collect(source: Path, frames: Iterator[Pixels], size: tuple[int, int] | None) -> list[Pixels]:
    taken: list[Pixels] = []
    used = 0
    before: Pixels | None = None
    for frame in frames:
        if before is not frame:  # else it is still on screen
            picture = frame if size is None else fit(frame, size)
            before = frame
        if taken and picture.shape != taken[0].shape:
            raise VideoError(
                f"{source}: expected frames of one size, but frame {len(taken)} is"
                f" {_wh(picture)} after {_wh(taken[0])}; pass size=(height, width)"
            )
        used += picture.nbytes
        if used > MAX_CLIP_BYTES or len(taken) == MAX_CLIP_FRAMES:
            raise VideoError(
                f"{source}: frame {len(taken)} takes the clip past {MAX_CLIP_BYTES >> 20} MiB of"
                f" pixels or {MAX_CLIP_FRAMES} frames; pass max_frames, a smaller size or a lower"
                " fps"
            )
        taken.append(picture)
    return taken


def _checked_size(what: str, size: tuple[int, int]) -> tuple[int, int]:
    height, width = size
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise VideoError(
            f"{what}: size must be (height, width) within 1..{MAX_SIDE}, got {tuple(size)}"
        )
    return int(height), int(width)


def _wh(frame: Pixels) -> str:
    return f"{frame.shape[1]} x {frame.shape[0]} (w x h)"


def _count(frames: int) -> str:
    return "1 frame" if frames == 1 else f"{frames} frames"
