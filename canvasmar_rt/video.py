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

import heapq
import math
import os
import re
import secrets
import struct
import tempfile
import tokenize
import warnings
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain, islice, pairwise, repeat
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import av
import numpy as np
from av.buffer import Buffer
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image, ImageOps

from canvasmar_rt.errors import VideoError

Pixels = NDArray[np.uint8]
PathLike = str | os.PathLike[str]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})
VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif"}
    | {".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv", ".3gp"}
)
CLIP_SUFFIXES = VIDEO_SUFFIXES | {".npz", ".npy"}
ARRAY_KEYS = ("frames", "aux1_image", "video", "image")  # preferred first
MAX_SIDE = 16384  # pixels; a larger claim is taken for a broken or hostile header
# A longer clip than this must be asked for in parts; also what a hostile time stamp can cost.
MAX_CLIP_BYTES = 2 * 1024**3
MAX_CLIP_FRAMES = 100_000
UNTIMED_FPS = 10.0  # rate given to archives and folders when none is asked for (BAIR's)
UNSTATED_FPS = 25.0  # rate of a video that states none: FFmpeg's own default

_REORDER = 4  # frames whose time stamps may be out of order (packed B-frames in AVI)
_SEEK_FROM_S, _SEEK_MARGIN_S = 8.0, 3.0
# Demuxers that read no video of their own: text art by file name, and lists of other files.
_NOT_VIDEO = frozenset({"tty", "hls", "dash", "concat", "bin", "xbin", "idf", "adf", "rawvideo"})
_PLAYLIST = (b"#EXTM3U", b"ffconcat", b"<?xml", b"<MPD")
# Slower than FFmpeg's default fast path, but without its bias of up to one grey level.
_SCALER = (
    Interpolation.BICUBIC
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.BITEXACT
)
# What the parsers of PyAV, Pillow, zipfile and NumPy are known to raise on broken input.
_PARSER_ERRORS = (
    av.FFmpegError,
    OSError,
    EOFError,
    ValueError,
    TypeError,
    ArithmeticError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    tokenize.TokenError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


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


class _Shown(NamedTuple):
    """One frame of a source: on screen from `time`, until `end` if nothing follows (seconds)."""

    time: float
    end: float
    pixels: Callable[[], Pixels]


@dataclass(kw_only=True)
class _Track:
    """An opened source, decoded as it is iterated.

    `slack` is how far (seconds) a time stamp may be rounded away from its true instant;
    `measured` says that the rate is to be taken from the frames, the stated one being a guess.
    """

    shown: Iterator[_Shown]
    fps: float
    slack: float
    measured: bool = False
    skipped: int = 0
    notes: list[str] = field(default_factory=list)

    def skip(self, what: object) -> None:
        if not self.skipped:
            self.notes.append(f"damaged data was skipped, first: {_brief(what)}")
        self.skipped += 1


# ---------------------------------------------------------------------------------------------
# Reading


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
    except _PARSER_ERRORS as error:
        raise VideoError(
            f"{source}: expected a video, an image or an .npz/.npy archive, but it cannot be"
            f" decoded ({_brief(error)}); the file is damaged, cut short or of another kind"
        ) from error
    if len(frames) < min_frames:
        asked = "".join(
            [f" at {fps:g} fps" if fps else "", f" from {start:g} s on" if start else ""]
        )
        damage = f" ({track.skipped} damaged packets were skipped)" if track.skipped else ""
        raise VideoError(
            f"{source}: expected at least {_count(min_frames)}{asked}, got {len(frames)}{damage};"
            " give a longer clip, an earlier start or a lower min_frames"
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
    if source.is_file():
        return [source]
    images, clips = _listing(source)
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
    _check_pixels("fit", frames, ranks=(3, 4))
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


@contextmanager
def _open(source: Path, fps: float | None, start: float, key: str | None) -> Iterator[_Track]:
    if not source.exists():
        raise VideoError(f"{source}: no such file or folder; check the path")
    if not source.is_dir() and not source.is_file():
        raise VideoError(f"{source}: expected a file or a folder, got a device, pipe or socket")
    if source.is_file() and source.stat().st_size == 0:
        raise VideoError(f"{source}: the file is empty (0 bytes); copy or download it again")
    suffix = source.suffix.lower()
    if key is not None and suffix != ".npz":
        raise VideoError(f"{source}: key={key!r} names an array of an .npz, this is no .npz")
    if source.is_dir():
        images, _ = _listing(source)
        if not images:
            raise VideoError(
                f"{source}: expected a folder of image frames"
                f" ({', '.join(sorted(IMAGE_SUFFIXES))}), found none in it"
            )
        yield _untimed((_picture(image) for image in images), fps)
    elif suffix in IMAGE_SUFFIXES:
        yield _untimed(iter([_picture(source)]), fps)
    elif suffix == ".npz":
        with (
            zipfile.ZipFile(source) as archive,
            _open_member(source, archive, key) as (header, file, have),
        ):
            yield _untimed(_array_frames(source, header, file, have), fps)
    elif suffix == ".npy":
        with source.open("rb") as file:
            header = _array_header(source, source.name, file)
            have = source.stat().st_size - file.tell()
            yield _untimed(_array_frames(source, header, file, have), fps)
    else:
        with _open_video(source, timed=fps is not None or start > 0, start=start) as track:
            yield track


def _untimed(frames: Iterator[Callable[[], Pixels]], fps: float | None) -> _Track:
    rate = UNTIMED_FPS if fps is None else float(fps)
    shown = (_Shown(i / rate, (i + 1) / rate, pixels) for i, pixels in enumerate(frames))
    notes = [] if fps else [f"the source states no frame rate: {rate:g} fps is assumed"]
    return _Track(shown=shown, fps=rate, slack=0.25 / rate, notes=notes)


def _in_order(track: _Track, start: float) -> Iterator[Pixels]:
    """Every frame, from the one on screen at `start`."""
    first = 0.0
    for count, shown in enumerate(_from(track, start), 1):
        first = shown.time if count == 1 else first
        if track.measured and shown.end > first:
            track.fps = count / (shown.end - first)
        yield shown.pixels()


def _from(track: _Track, start: float) -> Iterator[_Shown]:
    if start == 0:
        yield from track.shown
        return
    before: _Shown | None = None
    for now in chain(track.shown, (None,)):
        if before is not None:
            until = before.end if now is None else now.time
            if until - track.slack > start:
                yield before
        before = now


def _by_time(track: _Track, fps: float, start: float) -> Iterator[Pixels]:
    """The frame on screen at each instant `start + k / fps`."""
    k = 0
    before: _Shown | None = None
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


# ---------------------------------------------------------------------------------------------
# Video streams


@contextmanager
def _open_video(source: Path, *, timed: bool, start: float = 0.0) -> Iterator[_Track]:
    with source.open("rb") as file:
        head = file.read(64).lstrip()
    if head.startswith(_PLAYLIST):
        raise VideoError(f"{source}: this is a playlist or text, not a video; give the video")
    seek_to = _seek_point(source, start) if start > _SEEK_FROM_S else None
    with _container(source) as container:
        stream = _video_stream(source, container)
        tick = float(stream.time_base) if stream.time_base else 0.0
        rates = (stream.average_rate, stream.guessed_rate, stream.base_rate)
        fps = next((float(rate) for rate in rates if rate and rate > 0), 0.0)
        track = _Track(shown=iter(()), fps=fps or UNSTATED_FPS, slack=0.0)
        track.measured = container.format.name in ("gif", "apng")  # a delay for each frame
        # A clock as coarse as the frames themselves counts frames and rounds nothing.
        rounded = tick < 0.5 / track.fps
        track.slack = max(1e-6, min(tick, 0.25 / track.fps)) if rounded else 1e-6
        if not fps:
            track.notes.append(f"the video states no frame rate: {UNSTATED_FPS:g} fps is assumed")
        origin = None
        if seek_to is not None:
            origin, offset = seek_to
            container.seek(offset, stream=stream)
        frames = _decoded(source, container, stream, track)
        track.shown = _timed(frames, track.fps, _REORDER if timed else 0, origin)
        yield track


@contextmanager
def _container(source: Path) -> Iterator[InputContainer]:
    # An absolute path, so that no part of a file name is taken for a protocol; and no protocol
    # but local files, so that no header can send the reader to a network.
    with av.open(
        str(source.resolve()),
        metadata_errors="ignore",
        container_options={"protocol_whitelist": "file"},
    ) as container:
        if _NOT_VIDEO & set(container.format.name.split(",")):
            raise VideoError(
                f"{source}: expected a video, got {container.format.name} (text, raw bytes or a"
                " list of files); give a video with a header, such as .mp4"
            )
        yield container


def _video_stream(source: Path, container: InputContainer) -> VideoStream:
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        kinds = ", ".join(sorted({s.type for s in container.streams})) or "no streams"
        raise VideoError(f"{source}: expected a video stream, got only: {kinds}; give a video")
    stream = streams[0]
    if stream.codec_context is None:
        raise VideoError(f"{source}: this PyAV build has no decoder for its video; re-encode it")
    _check_side(source, stream.height, stream.width)
    return stream


def _seek_point(source: Path, start: float) -> tuple[float, int] | None:
    """Time stamp (s) of the first frame, and an offset from which `start` can be reached.

    None where the file cannot be trusted to seek; it is then decoded from its beginning.
    """
    try:
        with _container(source) as container:
            stream = _video_stream(source, container)
            first = next(container.decode(stream))
            if first.pts is None or not stream.time_base:
                return None
            offset = int((first.time + start - _SEEK_MARGIN_S) / stream.time_base)
            container.seek(offset, stream=stream)
            landed = next(container.decode(stream))
            if landed.pts is None or landed.time > first.time + start - 0.5 * _SEEK_MARGIN_S:
                return None
            return first.time, offset
    except (av.FFmpegError, StopIteration):
        return None


def _decoded(
    source: Path, container: InputContainer, stream: VideoStream, track: _Track
) -> Iterator[VideoFrame]:
    """Frames in display order, past damaged packets, which are counted on `track`."""
    packets = container.demux(stream)
    while True:
        frames: list[VideoFrame] = []
        try:
            packet = next(packets, None)
        except av.FFmpegError as error:  # the container itself breaks off
            track.skip(error)
            packet = None
        try:
            frames = stream.codec_context.decode(packet)
        except av.EOFError:  # already flushed by the demuxer's own last packet
            return
        except av.FFmpegError as error:
            track.skip(error)
        for frame in frames:
            _check_side(source, frame.height, frame.width)
            if frame.is_corrupt:
                track.skip("a frame the decoder marks as damaged")
            else:
                yield frame
        if packet is None:
            return


def _timed(
    frames: Iterator[VideoFrame], fps: float, reorder: int, origin: float | None
) -> Iterator[_Shown]:
    """Give each frame its time: frames come in display order, their time stamps may not.

    The smallest stamp among the next few frames belongs to the first of them. A frame without a
    stamp follows the last one at the nominal rate, and so does a clock that starts again.
    """
    step, convert = 1.0 / fps, VideoReformatter()
    ahead: deque[VideoFrame] = deque()
    stamps: list[float] = []
    shift, newest, last = 0.0, -math.inf, -math.inf
    for frame in chain(frames, repeat(None, reorder + 1)):
        if frame is not None:
            ahead.append(frame)
            if frame.pts is not None:
                stamp = frame.time + shift
                if stamp < newest - 2 * _REORDER * step:  # the clock started again
                    shift += newest + step - stamp
                    stamp = newest + step
                newest = max(newest, stamp)
                heapq.heappush(stamps, stamp)
            if len(ahead) <= reorder:
                continue
        if not ahead:
            return
        shown = ahead.popleft()
        if shown.pts is not None:
            time = max(heapq.heappop(stamps), last)
        else:
            time = last + step if last > -math.inf else 0.0
        last = time
        origin = time if origin is None else origin
        stays = float(shown.duration * (shown.time_base or 0)) or step
        now = time - origin
        yield _Shown(now, now + stays, lambda frame=shown: _upright_rgb(frame, convert))  # type: ignore[misc]


def _upright_rgb(frame: VideoFrame, convert: VideoReformatter) -> Pixels:
    """One decoded frame as (H, W, 3) uint8, over black, turned as its display matrix says."""
    pixel_format = frame.format
    seethrough = pixel_format.has_palette or any(c.is_alpha for c in pixel_format.components)
    target = "rgba" if seethrough else "rgb24"
    picture = convert.reformat(frame, format=target, interpolation=_SCALER).to_ndarray()
    rgb = np.asarray(picture, dtype=np.uint8)
    if seethrough:
        rgb = _over_black(rgb)
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return rgb
    # x' = a x + c y, y' = b x + d y (16.16 fixed point): one of eight turns and mirrorings.
    a, b, _, c, d = struct.unpack("=9i", bytes(cast(Buffer, matrix)))[:5]
    x_sign, y_sign = (a, d) if abs(a) >= abs(c) else (c, b)
    if abs(a) < abs(c):
        rgb = rgb.transpose(1, 0, 2)
    return np.ascontiguousarray(rgb[:: -1 if y_sign < 0 else 1, :: -1 if x_sign < 0 else 1])


def _over_black(rgba: Pixels) -> Pixels:
    alpha = rgba[..., 3:].astype(np.uint16)
    if alpha.min(initial=255) == 255:
        return rgba[..., :3]
    return ((rgba[..., :3] * alpha + 127) // 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------
# Images and archives


def _listing(folder: Path) -> tuple[list[Path], list[Path]]:
    """Image frames and clips that lie directly in `folder`, each in natural order."""
    try:
        names = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
        files = sorted((entry for entry in names if entry.is_file()), key=_natural)
    except OSError as error:
        raise VideoError(f"{folder}: cannot be listed ({_brief(error)}); check the path") from error
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    return images, [file for file in files if file.suffix.lower() in CLIP_SUFFIXES]


def _natural(path: Path) -> tuple[list[str | int], str]:
    parts = re.split(r"([0-9]+)", path.name.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], path.name


def _picture(path: Path) -> Callable[[], Pixels]:
    def load() -> Pixels:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(path) as image:
                    _check_side(path, image.height, image.width)
                    return _image_rgb(path, ImageOps.exif_transpose(image))
        except VideoError:
            raise
        except _PARSER_ERRORS as error:
            raise VideoError(
                f"{path}: expected an image, but it cannot be decoded ({_brief(error)});"
                " replace it or take it out of the folder"
            ) from error

    return load


def _image_rgb(path: Path, image: Image.Image) -> Pixels:
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.stack([grey] * 3, axis=-1)
    if image.mode in ("I", "F"):
        raise VideoError(f"{path}: expected 8- or 16-bit pixels, got mode {image.mode}; convert it")
    if image.has_transparency_data:
        return _over_black(np.asarray(image.convert("RGBA")))
    return np.asarray(image.convert("RGB"))


class _Header(NamedTuple):
    name: str
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype.name}{list(self.shape)}"


def _array_header(source: Path, name: str, file: IO[bytes]) -> _Header:
    version = np.lib.format.read_magic(file)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise VideoError(f"{source}: array {name} is in .npy format {version}, expected 1.0 or 2.0")
    return _Header(name, *readers[version](file))


@contextmanager
def _open_member(
    source: Path, archive: zipfile.ZipFile, key: str | None
) -> Iterator[tuple[_Header, IO[bytes], int]]:
    """The chosen array of an .npz: its header, and the bytes that follow, and how many."""
    members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    headers = {}
    for name, info in members.items():
        if not info.filename.endswith(".npy"):
            continue
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise VideoError(f"{source}: {name} is packed by a method that NumPy does not write")
        with archive.open(info) as file:
            headers[name] = _array_header(source, name, file)
    held = "; ".join(str(header) for header in islice(headers.values(), 12)) or "no arrays"
    videos = [name for name, h in headers.items() if len(h.shape) == 4 and h.shape[-1] == 3]
    if key is None:
        named = [name for name in ARRAY_KEYS if name in videos]
        if not named and len(videos) != 1:
            raise VideoError(
                f"{source}: expected one array shaped (T, H, W, 3), found {len(videos)}"
                f" ({held}); pass key= with its name"
            )
        key = named[0] if named else videos[0]
    elif key not in headers:
        raise VideoError(f"{source}: no array is called {key!r} (holds: {held}); pass another key")
    with archive.open(members[key]) as file:
        header = _array_header(source, key, file)
        yield header, file, members[key].file_size - file.tell()


def _array_frames(
    source: Path, header: _Header, file: IO[bytes], have: int
) -> Iterator[Callable[[], Pixels]]:
    """Frames of one array, whose `have` bytes of data begin where `file` stands."""
    name, shape, fortran, dtype = header
    if dtype.hasobject:
        raise VideoError(
            f"{source}: {name} holds Python objects, which are never unpickled;"
            " save it as a plain uint8 array (T, H, W, 3)"
        )
    if len(shape) != 4 or shape[-1] != 3 or min(shape) < 0:
        raise VideoError(f"{source}: expected pixels shaped (T, H, W, 3), got {header}")
    if dtype.kind not in "ui":
        raise VideoError(
            f"{source}: expected integer pixels in 0..255, got {header};"
            " convert them to uint8 before saving"
        )
    _check_side(source, shape[1], shape[2], least=1)
    frame_bytes = math.prod(shape[1:]) * dtype.itemsize
    if frame_bytes * shape[0] > have:
        raise VideoError(
            f"{source}: {header} needs {frame_bytes * shape[0]} bytes, the file holds {have};"
            " it is damaged or cut short, copy it again"
        )
    if fortran:  # a frame's bytes lie scattered over the whole array: all or nothing
        if frame_bytes * shape[0] > MAX_CLIP_BYTES:
            raise VideoError(
                f"{source}: {header} is in Fortran order and above {MAX_CLIP_BYTES >> 20} MiB;"
                " save it in C order, which can be read frame by frame"
            )
        data = _exactly(source, name, file, frame_bytes * shape[0])
        whole = np.frombuffer(data, dtype).reshape(shape[::-1]).transpose()
        for values in whole:
            yield lambda values=values: _to_uint8(source, header, values)  # type: ignore[misc]
        return
    for _ in range(shape[0]):
        data = _exactly(source, name, file, frame_bytes)
        values = np.frombuffer(data, dtype).reshape(shape[1:])
        yield lambda values=values: _to_uint8(source, header, values)  # type: ignore[misc]


def _exactly(source: Path, name: str, file: IO[bytes], count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise VideoError(f"{source}: {name} breaks off in the middle; copy the file again")
    return data


def _to_uint8(source: Path, header: _Header, values: NDArray[Any]) -> Pixels:
    if values.dtype != np.uint8:
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 255:
            raise VideoError(
                f"{source}: expected pixels in 0..255, got {low}..{high} in {header};"
                " scale them to 8 bits before saving"
            )
    return values.astype(np.uint8)


# ---------------------------------------------------------------------------------------------
# Writing


def write_clip(path: PathLike, frames: Pixels, fps: float) -> list[Path]:
    """Write (T, H, W, 3) uint8 frames by suffix, and return the files written.

    `.mp4` is H.264, 4:2:0, crf 16, BT.601 limited range and tagged so; an odd size is padded to
    even by repeating its last row or column. `.gif` has one palette for the whole clip, so that
    still parts stay still, and equal frames that follow each other become one that stays longer.
    `.png` is exact: numbered frames `<stem>_0000.png`, .. beside the given path.

    A file appears under its name only when it is complete. The parent folder is made.

    Raises:
        VideoError: frames, fps or suffix cannot be written, or the disk refuses.
    """
    target = Path(path)
    _check_pixels(str(target), frames, ranks=(4,))
    if not (math.isfinite(fps) and 0.01 <= fps <= 1000):
        raise VideoError(f"{target}: fps must be within 0.01..1000, got {fps}")
    suffix = target.suffix.lower()
    if suffix not in (".mp4", ".gif", ".png"):
        raise VideoError(
            f"{target}: expected a name ending in .mp4, .gif or .png (numbered frames),"
            f" got {target.suffix or 'no suffix'}"
        )
    with _refusals(target):
        if suffix == ".png":
            return _write_numbered(target, frames)
        write = _write_mp4 if suffix == ".mp4" else _write_gif
        with _replacing(target) as temporary:
            write(temporary, target, frames, float(fps))
    return [target]


def write_png(path: PathLike, image: Pixels) -> Path:
    """Write one (H, W, 3) uint8 image as PNG, whole or not at all.

    Raises:
        VideoError: the image or the suffix cannot be written, or the disk refuses.
    """
    target = Path(path)
    _check_pixels(str(target), image, ranks=(3,))
    if target.suffix.lower() != ".png":
        raise VideoError(f"{target}: expected a name ending in .png, got {target.suffix!r}")
    with _refusals(target), _replacing(target) as temporary:
        Image.fromarray(np.ascontiguousarray(image)).save(temporary, "PNG")
    return target


@contextmanager
def _refusals(target: Path) -> Iterator[None]:
    """Make the parent folder; whatever the disk or the encoder refuses is one VideoError."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except VideoError:
        raise
    except (av.FFmpegError, OSError, ValueError, MemoryError, struct.error) as error:
        raise VideoError(
            f"{target}: cannot be written ({_brief(error)});"
            " check that the folder can be written to and has space"
        ) from error


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A temporary name beside `target`, which takes its place once the body has succeeded."""
    temporary = target.with_name(f".{secrets.token_hex(8)}{target.suffix}")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _write_mp4(temporary: Path, target: Path, frames: Pixels, fps: float) -> None:
    if "libx264" not in av.codecs_available:
        raise VideoError(f"{target}: this PyAV build has no libx264; write .gif or .png instead")
    height, width = frames.shape[1:3]
    pad = ((0, height % 2), (0, width % 2), (0, 0))
    with av.open(
        str(temporary), "w", format="mp4", options={"movflags": "+faststart"}
    ) as container:
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate, options={"crf": "16"})
        stream.height, stream.width = height + height % 2, width + width % 2
        stream.pix_fmt = "yuv420p"
        stream.codec_context.color_range = ColorRange.MPEG
        stream.codec_context.colorspace = 6  # AVCOL_SPC_SMPTE170M: the matrix used below
        convert = VideoReformatter()
        for image in frames:
            padded = np.pad(image, pad, mode="edge")
            frame = convert.reformat(
                VideoFrame.from_ndarray(np.ascontiguousarray(padded), format="rgb24"),
                format="yuv420p",
                dst_colorspace=Colorspace.ITU601,
                dst_color_range=ColorRange.MPEG,
                interpolation=_SCALER,
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _write_gif(temporary: Path, target: Path, frames: Pixels, fps: float) -> None:
    if fps > 50:
        raise VideoError(f"{target}: a GIF shows at most 50 fps, got {fps:g}; write .mp4 instead")
    # Palette of a mosaic of up to 32 frames, spread over the clip. No dithering: it crawls.
    some = frames[:: max(1, math.ceil(len(frames) / 32))]
    mosaic = Image.fromarray(np.ascontiguousarray(some.reshape(-1, *frames.shape[2:])))
    palette = mosaic.quantize(256, method=Image.Quantize.FASTOCTREE)
    images = [
        Image.fromarray(np.ascontiguousarray(frame)).quantize(
            palette=palette, dither=Image.Dither.NONE
        )
        for frame in frames
    ]
    # Whole centiseconds, rounded on the running time, so that the clip keeps its length.
    clock = [round(100 * i / fps) for i in range(len(frames) + 1)]
    delays = [10 * (after - before) for before, after in pairwise(clock)]
    images[0].save(
        temporary, "GIF", save_all=True, append_images=images[1:], duration=delays, loop=0
    )


def _write_numbered(target: Path, frames: Pixels) -> list[Path]:
    names = [target.with_name(f"{target.stem}_{i:04d}.png") for i in range(len(frames) + 1)]
    if names[-1].exists():
        raise VideoError(
            f"{names[-1]}: left from a longer clip, it would be read as part of this one;"
            " remove the old frames or choose another name"
        )
    # All frames are complete in a hidden folder before the first one takes its name.
    with tempfile.TemporaryDirectory(prefix=".", dir=target.parent) as folder:
        for name, frame in zip(names, frames, strict=False):
            Image.fromarray(np.ascontiguousarray(frame)).save(Path(folder, name.name), "PNG")
        for name in names[:-1]:
            os.replace(Path(folder, name.name), name)
    return names[:-1]


# ---------------------------------------------------------------------------------------------
# Checks shared by both directions


def _check_pixels(what: str, frames: Pixels, ranks: Sequence[int]) -> None:
    wanted = " or ".join({3: "(H, W, 3)", 4: "(T, H, W, 3)"}[rank] for rank in ranks)
    if not isinstance(frames, np.ndarray):
        raise VideoError(f"{what}: expected a uint8 array {wanted}, got {type(frames).__name__}")
    fits = frames.ndim in ranks and frames.shape[-1] == 3 and frames.size > 0
    if frames.dtype != np.uint8 or not fits:
        raise VideoError(
            f"{what}: expected uint8 {wanted}, none of them 0, got {frames.dtype} {frames.shape}"
        )


def _checked_size(what: str, size: tuple[int, int]) -> tuple[int, int]:
    height, width = size
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise VideoError(
            f"{what}: size must be (height, width) within 1..{MAX_SIDE}, got {tuple(size)}"
        )
    return int(height), int(width)


def _check_side(source: Path, height: int, width: int, least: int = 0) -> None:
    """`least` is 0 for a stream, whose size may only be known once a frame is decoded."""
    if not (least <= height <= MAX_SIDE and least <= width <= MAX_SIDE):
        raise VideoError(
            f"{source}: the header claims pictures of {width} x {height}, expected 1..{MAX_SIDE}"
            " pixels a side; scale it down, or the file is damaged"
        )


def _wh(frame: Pixels) -> str:
    return f"{frame.shape[1]} x {frame.shape[0]} (w x h)"


def _count(frames: int) -> str:
    return "1 frame" if frames == 1 else f"{frames} frames"


def _brief(error: object) -> str:
    """The reason alone: one line, without the path, which the message already names."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    line = " ".join(str(text).split())
    return line if len(line) <= 160 else f"{line[:157]}.."
