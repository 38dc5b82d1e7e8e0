"""What the video modules share: limits, suffixes, an opened source, checks and messages.

Notation: T frames, H rows, W columns; a frame is (H, W, 3) RGB, 0..255.
"""

from __future__ import annotations

import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import Interpolation
from numpy.typing import NDArray
from PIL import Image

from canvasmar_rt.errors import VideoError

Pixels = NDArray[np.uint8]
PathLike = str | os.PathLike[str]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})
VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif"}
    | {".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv", ".3gp"}
)
ARCHIVE_SUFFIXES = frozenset({".npz", ".npy"})
CLIP_SUFFIXES = VIDEO_SUFFIXES | ARCHIVE_SUFFIXES
ARRAY_KEYS = ("frames", "aux1_image", "video", "image")  # preferred first
MAX_SIDE = 16384  # pixels; a larger claim is taken for a broken or hostile header
# A longer clip than this must be asked for in parts; also what a hostile time stamp can cost.
MAX_CLIP_BYTES = 2 * 1024**3
MAX_CLIP_FRAMES = 100_000
UNTIMED_FPS = 10.0  # rate given to archives and folders when none is asked for (BAIR's)
UNSTATED_FPS = 25.0  # rate of a video that states none: FFmpeg's own default

# Slower than FFmpeg's default fast path, but without its bias of up to one grey level.
SCALER = (
    Interpolation.BICUBIC
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.BITEXACT
)
# What the parsers of PyAV, Pillow, zipfile and NumPy are known to raise on broken input.
PARSER_ERRORS = (
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


class Shown(NamedTuple):
    """One frame of a source: on screen from `time`, until `end` if nothing follows (seconds)."""

    time: float
    end: float
    pixels: Callable[[], Pixels]


@dataclass(kw_only=True)
class Track:
    """An opened source, decoded as it is iterated.

    `slack` is how far (seconds) a time stamp may be rounded away from its true instant;
    `measured` says that the rate is to be taken from the frames, the stated one being a guess.
    """

    shown: Iterator[Shown]
    fps: float
    slack: float
    measured: bool = False
    skipped: int = 0
    notes: list[str] = field(default_factory=list)

    def skip(self, what: object) -> None:
        if not self.skipped:
            self.notes.append(f"damaged data was skipped, first: {brief(what)}")
        self.skipped += 1


def over_black(rgba: Pixels) -> Pixels:
    """(H, W, 4) with straight alpha laid over black: (H, W, 3)."""
    alpha = rgba[..., 3:].astype(np.uint16)
    if alpha.min(initial=255) == 255:
        return rgba[..., :3]
    return ((rgba[..., :3] * alpha + 127) // 255).astype(np.uint8)


def check_pixels(what: str, frames: Pixels, ranks: Sequence[int]) -> None:
    wanted = " or ".join({3: "(H, W, 3)", 4: "(T, H, W, 3)"}[rank] for rank in ranks)
    if not isinstance(frames, np.ndarray):
        raise VideoError(f"{what}: expected a uint8 array {wanted}, got {type(frames).__name__}")
    fits = frames.ndim in ranks and frames.shape[-1] == 3 and frames.size > 0
    if frames.dtype != np.uint8 or not fits:
        raise VideoError(
            f"{what}: expected uint8 {wanted}, none of them 0, got {frames.dtype} {frames.shape}"
        )


def check_side(source: Path, height: int, width: int, least: int = 0) -> None:
    """`least` is 0 for a stream, whose size may only be known once a frame is decoded."""
    if not (least <= height <= MAX_SIDE and least <= width <= MAX_SIDE):
        raise VideoError(
            f"{source}: the header claims pictures of {width} x {height}, expected 1..{MAX_SIDE}"
            " pixels a side; scale it down, or the file is damaged"
        )


def brief(error: object) -> str:
    """The reason alone: one line, without the path, which the message already names."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    line = " ".join(str(text).split())
    return line if len(line) <= 160 else f"{line[:157]}.."
