"""Images and .npz/.npy archives: frames that carry no clock, read one by one."""

from __future__ import annotations

import io
import math
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from canvasmar_rt._video_common import (
    ARRAY_KEYS,
    CLIP_SUFFIXES,
    IMAGE_SUFFIXES,
    MAX_CLIP_BYTES,
    PARSER_ERRORS,
    UNTIMED_FPS,
    Pixels,
    Shown,
    Track,
    brief,
    check_side,
    over_black,
)
from canvasmar_rt.actions import is_actions
from canvasmar_rt.errors import VideoError


def listing(folder: Path) -> tuple[list[Path], list[Path]]:
    """Image frames and clips that lie directly in `folder`, each in natural order, but no files of
    their actions."""
    try:
        shown = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
        found = [entry for entry in shown if entry.is_file() and not is_actions(entry)]
        files = sorted(found, key=lambda file: natural(file.name))
    except OSError as error:
        raise VideoError(f"{folder}: cannot be listed ({brief(error)}); check the path") from error
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    return images, [file for file in files if file.suffix.lower() in CLIP_SUFFIXES]


def natural(name: str) -> tuple[list[str | int], str]:
    """A key that sorts names by the numbers in them."""
    parts = re.split(r"([0-9]+)", name.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def untimed(frames: Iterator[Callable[[], Pixels]], fps: float | None) -> Track:
    """Frames without a clock, numbered at `fps` or, if none is asked for, at `UNTIMED_FPS`."""
    rate = UNTIMED_FPS if fps is None else float(fps)
    shown = (Shown(i / rate, (i + 1) / rate, pixels) for i, pixels in enumerate(frames))
    notes = [] if fps else [f"the source states no frame rate: {rate:g} fps is assumed"]
    return Track(shown=shown, fps=rate, slack=0.25 / rate, notes=notes)


PICTURES = ("PNG", "JPEG", "BMP", "WEBP")
"""What Pillow may take an image file for, whatever its name; some JPEG becomes MPO, of phones."""


def picture_at(path: Path) -> Callable[[], Pixels]:
    """What decodes the image file at `path`, upright, once it is called."""

    def load() -> Pixels:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(path, formats=PICTURES) as image:
                    check_side(path, image.height, image.width)
                    frames = getattr(image, "n_frames", 1)
                    if image.format != "MPO" and frames > 1:
                        raise VideoError(
                            f"{path}: expected a picture, got a film of {frames} frames; convert it"
                            " to .gif or .mp4"
                        )
                    return _image_rgb(path, ImageOps.exif_transpose(image))
        except VideoError:
            raise
        except PARSER_ERRORS as error:
            raise VideoError(
                f"{path}: expected an image, but it cannot be decoded ({brief(error)});"
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
        return over_black(np.asarray(image.convert("RGBA")))
    return np.asarray(image.convert("RGB"))


class _Header(NamedTuple):
    name: str
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype.name}{list(self.shape)}"


MAX_HEADER_BYTES = 64 << 10


def array_header(source: Path, name: str, file: IO[bytes]) -> _Header:
    """Read a .npy header, and leave `file` where the data begin."""
    version = np.lib.format.read_magic(file)
    readers = {
        (1, 0): ("<H", np.lib.format.read_array_header_1_0),
        (2, 0): ("<I", np.lib.format.read_array_header_2_0),
    }
    if version not in readers:
        raise VideoError(f"{source}: array {name} is in .npy format {version}, expected 1.0 or 2.0")
    length, read = readers[version]
    stated = file.read(struct.calcsize(length))
    if len(stated) < struct.calcsize(length):
        raise VideoError(f"{source}: {name} breaks off in its header; copy the file again")
    (count,) = struct.unpack(length, stated)
    if count > MAX_HEADER_BYTES:  # NumPy would read it whole before it looks
        raise VideoError(f"{source}: array {name} states a header of {count} bytes; it is damaged")
    return _Header(name, *read(io.BytesIO(stated + file.read(count))))


@contextmanager
def open_member(
    source: Path, archive: zipfile.ZipFile, key: str | None
) -> Iterator[tuple[_Header, IO[bytes], int]]:
    """The chosen array of an .npz: its header, and the bytes that follow, and how many."""
    members = {
        info.filename.removesuffix(".npy"): info
        for info in archive.infolist()
        if info.filename.endswith(".npy")
    }
    headers = {}
    for name, info in members.items():
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise VideoError(f"{source}: {name} is packed by a method that NumPy does not write")
        with archive.open(info) as file:
            headers[name] = array_header(source, name, file)
    held = "; ".join(str(header) for header in islice(headers.values(), 12)) or "no arrays"
    videos = [name for name, h in headers.items() if len(h.shape) == 4 and h.shape[-1] == 3]
    if key is None:
        named = [name for name in ARRAY_KEYS if name in videos]
        if not named and len(videos) != 1:
            raise VideoError(
                f"{source}: expected one array shaped (T, H, W, 3), found {len(videos)}"
                f" ({held}); save the one to read as {ARRAY_KEYS[0]!r},"
                " or pass its name to read_clip(key=...)"
            )
        key = named[0] if named else videos[0]
    elif key not in headers:
        raise VideoError(f"{source}: no array is called {key!r} (holds: {held}); pass another key")
    with archive.open(members[key]) as file:
        header = array_header(source, key, file)
        yield header, file, members[key].file_size - file.tell()


def array_frames(
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
    check_side(source, shape[1], shape[2], least=1)
    frame_bytes = math.prod(shape[1:]) * dtype.itemsize
    if frame_bytes > MAX_CLIP_BYTES // 4:  # it is held twice while it becomes uint8
        raise VideoError(
            f"{source}: a frame of {header} takes {frame_bytes >> 20} MiB; save smaller ones, or "
            "as uint8"
        )
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
