"""Writing clips and pictures: a file appears under its name only when it is complete."""

from __future__ import annotations

import glob
import math
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from PIL import Image

from canvasmar_rt._video_common import SCALER, PathLike, Pixels, brief, check_pixels
from canvasmar_rt.errors import VideoError
from canvasmar_rt.files import replacing


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
    check_pixels(str(target), frames, ranks=(4,))
    check_target(target, len(frames), fps)
    suffix = target.suffix.lower()
    with _refusals(target):
        if suffix == ".png":
            return _write_numbered(target, frames)
        write = _write_mp4 if suffix == ".mp4" else _write_gif
        with replacing(target) as temporary:
            write(temporary, target, frames, float(fps))
    return [target]


def check_target(target: Path, count: int, fps: float) -> None:
    """See that `write_clip` takes this name and rate for `count` frames, before there are any.

    Raises:
        VideoError: fps or suffix cannot be written, or numbered frames of a longer clip are there.
    """
    if not (math.isfinite(fps) and 0.01 <= fps <= 1000):
        raise VideoError(f"{target}: fps must be within 0.01..1000, got {fps}")
    suffix = target.suffix.lower()
    if suffix not in (".mp4", ".gif", ".png"):
        raise VideoError(
            f"{target}: expected a name ending in .mp4, .gif or .png (numbered frames),"
            f" got {target.suffix or 'no suffix'}"
        )
    if suffix == ".gif" and fps > 50:
        raise VideoError(f"{target}: a GIF shows at most 50 fps, got {fps:g}; write .mp4 instead")
    if suffix == ".png":
        left = [
            int(number)
            for path in target.parent.glob(f"{glob.escape(target.stem)}_*.png")
            if (number := path.stem.removeprefix(f"{target.stem}_")).isdecimal()
        ]
        if after := sorted(i for i in left if i >= count):
            raise VideoError(
                f"{_numbered(target, after[0])}: left from a longer clip, it would be read as part"
                " of this one; remove the old frames or choose another name"
            )
        for i in left:
            if _numbered(target, i).is_dir():
                raise VideoError(f"{_numbered(target, i)}: is a directory; choose another name")


def write_png(path: PathLike, image: Pixels) -> Path:
    """Write one (H, W, 3) uint8 image as PNG, whole or not at all.

    Raises:
        VideoError: the image or the suffix cannot be written, or the disk refuses.
    """
    target = Path(path)
    check_pixels(str(target), image, ranks=(3,))
    if target.suffix.lower() != ".png":
        raise VideoError(f"{target}: expected a name ending in .png, got {target.suffix!r}")
    with _refusals(target), replacing(target) as temporary:
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
    except (
        av.FFmpegError, OSError, ValueError, OverflowError, MemoryError, struct.error,
    ) as error:  # fmt: skip
        raise VideoError(
            f"{target}: cannot be written ({brief(error)});"
            " check that the folder can be written to and has space"
        ) from error


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
                interpolation=SCALER,
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _write_gif(temporary: Path, target: Path, frames: Pixels, fps: float) -> None:
    # Palette of every frame, of a long clip thinned out in space: what is seen in a single frame
    # counts. No dithering: it crawls.
    step = math.ceil(math.sqrt(len(frames) / 32))
    some = frames[:, ::step, ::step]
    mosaic = Image.fromarray(np.ascontiguousarray(some.reshape(-1, *some.shape[2:])))
    palette = mosaic.quantize(256, method=Image.Quantize.FASTOCTREE)
    # Pillow looks colours up in cells of four levels, by a cell's darkest corner: to be nearest to
    # its middle, the palette must be darker while it looks.
    colours = palette.getpalette() or []
    palette.putpalette([max(0, level - 1) for level in colours])
    images = [
        Image.fromarray(np.ascontiguousarray(frame)).quantize(
            palette=palette, dither=Image.Dither.NONE
        )
        for frame in frames
    ]
    for image in images:
        image.putpalette(colours)
    # Whole centiseconds, rounded on the running time, so that the clip keeps its length.
    clock = [round(100 * i / fps) for i in range(len(frames) + 1)]
    delays = [10 * (after - before) for before, after in pairwise(clock)]
    images[0].save(
        temporary, "GIF", save_all=True, append_images=images[1:], duration=delays, loop=0
    )


def _numbered(target: Path, i: int) -> Path:
    return target.with_name(f"{target.stem}_{i:04d}.png")


def _write_numbered(target: Path, frames: Pixels) -> list[Path]:
    names = [_numbered(target, i) for i in range(len(frames))]
    # All frames are complete in a hidden folder before the first one takes its name.
    with tempfile.TemporaryDirectory(prefix=".", dir=target.parent) as folder:
        for name, frame in zip(names, frames, strict=True):
            Image.fromarray(np.ascontiguousarray(frame)).save(Path(folder, name.name), "PNG")
        for name in names:
            os.replace(Path(folder, name.name), name)
    return names
