"""Labelled grids of frames and colour maps of per-patch values, for people to look at.

Notation: H rows, W columns; every picture is (H, W, 3) uint8 RGB.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from canvasmar_rt._video_common import MAX_SIDE, Pixels, check_pixels
from canvasmar_rt.errors import VideoError

_CELL = 192  # pixels: without a scale, the largest picture comes as near to this as it can
_GAP, _MARGIN = 6, 10
_FONT, _TITLE_FONT = 15, 20  # pixels
_PAPER, _BLANK, _INK = (236, 236, 236), (222, 222, 222), (32, 32, 32)

# Plasma (Smith and van der Walt, CC0): lightness rises evenly from cool to warm, so the map is
# readable in grey and by colour-blind people.
_PLASMA = np.array(
    [
        (13, 8, 135),
        (70, 3, 159),
        (114, 1, 168),
        (156, 23, 158),
        (189, 55, 134),
        (216, 87, 107),
        (237, 121, 83),
        (251, 159, 58),
        (253, 202, 38),
        (240, 249, 33),
    ],
    dtype=np.float64,
)


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[Pixels | None]]],
    *,
    scale: int | None = None,
    title: str = "",
    columns: Sequence[str] | None = None,
) -> Pixels:
    """Draw one row of pictures for each (label, pictures), with all columns aligned.

    Args:
        rows: None leaves a cell blank; rows may differ in length.
        scale: whole-number enlargement of the largest picture (no smoothing). By default one
            that brings it to about 128 to 192 pixels. Smaller pictures are enlarged to fill
            the same cell, so latent-sized maps lie under the frames they belong to.
        columns: headings, by default the column numbers from 0.

    Returns:
        (H, W, 3) uint8.

    Raises:
        VideoError: no pictures, a picture that is not uint8 RGB, or a sheet too large to draw.
    """
    pictures = [picture for _, row in rows for picture in row if picture is not None]
    if not pictures:
        raise VideoError("contact sheet: expected at least one picture, got none")
    for picture in pictures:
        check_pixels("contact sheet", picture, ranks=(3,))
    if scale is not None and scale < 1:
        raise VideoError(f"contact sheet: scale must be 1 or more, got {scale}")
    count = max(len(row) for _, row in rows)
    if columns is None:
        columns = [str(column) for column in range(count)]
    if len(columns) != count:
        raise VideoError(f"contact sheet: expected {count} column headings, got {len(columns)}")

    largest_h = max(picture.shape[0] for picture in pictures)
    largest_w = max(picture.shape[1] for picture in pictures)
    if scale is None:
        scale = max(1, _CELL // max(largest_h, largest_w))
    cell_h, cell_w = largest_h * scale, largest_w * scale

    font = ImageFont.load_default(size=_FONT)
    title_font = ImageFont.load_default(size=_TITLE_FONT)
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    label_w, label_h = _extent(draw, [label for label, _ in rows], font)
    heading_w, heading_h = _extent(draw, columns, font)
    title_w, title_h = _extent(draw, [title] if title else [], title_font)

    step_x, step_y = max(cell_w, heading_w) + _GAP, max(cell_h, label_h) + _GAP
    left = _MARGIN + (label_w + 2 * _GAP if label_w else 0)
    heading_y = _MARGIN + (title_h + _MARGIN if title else 0)
    top = heading_y + heading_h + (_GAP if heading_h else 0)
    width = max(left + count * step_x - _GAP, _MARGIN + title_w) + _MARGIN
    height = top + len(rows) * step_y - _GAP + _MARGIN
    if max(width, height) > MAX_SIDE:
        raise VideoError(
            f"contact sheet: {count} columns and {len(rows)} rows of {cell_w} x {cell_h} need"
            f" {width} x {height} pixels, at most {MAX_SIDE} a side; show fewer or smaller ones"
        )

    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), title, fill=_INK, font=title_font)
    for column, heading in enumerate(columns):
        middle = left + column * step_x + (step_x - _GAP) / 2
        draw.text((middle, heading_y), heading, fill=_INK, font=font, anchor="ma")
    for number, (label, row) in enumerate(rows):
        y = top + number * step_y
        _, text_h = _extent(draw, [label], font)
        draw.text((_MARGIN, y + (step_y - _GAP - text_h) // 2), label, fill=_INK, font=font)
        for column in range(count):
            x = left + column * step_x + (step_x - _GAP - cell_w) // 2
            cell_y = y + (step_y - _GAP - cell_h) // 2
            drawn = row[column] if column < len(row) else None
            if drawn is None:
                draw.rectangle((x, cell_y, x + cell_w - 1, cell_y + cell_h - 1), fill=_BLANK)
                continue
            h, w = drawn.shape[:2]
            factor = min(cell_h // h, cell_w // w)
            image = Image.fromarray(drawn.repeat(factor, axis=0).repeat(factor, axis=1))
            at = (x + (cell_w - image.width) // 2, cell_y + (cell_h - image.height) // 2)
            sheet.paste(image, at)
    return np.asarray(sheet).copy()


def heatmap(values: NDArray[np.floating], size: tuple[int, int]) -> Pixels:
    """Colour a map of values: warm and light is 1 (still), cool and dark is 0 (moving).

    As in the paper's Fig. 4b. Each value stays a flat rectangle (nearest neighbour).

    Args:
        values: (h, w) float, 0..1.
        size: (height, width) of the picture.

    Returns:
        (height, width, 3) uint8.

    Raises:
        VideoError: another rank, values outside 0..1 or not finite, or an empty size.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or array.size == 0:
        raise VideoError(f"heatmap: expected values shaped (h, w), got {array.shape}")
    low, high = float(array.min()), float(array.max())
    if not (low >= -1e-6 and high <= 1 + 1e-6):  # NaN fails every comparison
        raise VideoError(f"heatmap: expected values in 0..1, got {low:g}..{high:g}")
    height, width = size
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise VideoError(f"heatmap: size must be (height, width) within 1..{MAX_SIDE}, got {size}")
    stops = np.linspace(0.0, 1.0, len(_PLASMA))
    colours = [np.interp(array, stops, channel) for channel in _PLASMA.T]  # each (h, w)
    picture = np.rint(np.stack(colours, axis=-1)).astype(np.uint8)
    y = np.arange(height) * array.shape[0] // height
    x = np.arange(width) * array.shape[1] // width
    flat: Pixels = picture[y[:, None], x[None, :]]
    return flat


def _extent(
    draw: ImageDraw.ImageDraw,
    texts: Sequence[str],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> tuple[int, int]:
    """Width and height (pixels) that hold each of `texts`."""
    boxes = [draw.textbbox((0, 0), text, font=font) for text in texts if text]
    return (
        max((int(np.ceil(box[2])) for box in boxes), default=0),
        max((int(np.ceil(box[3])) for box in boxes), default=0),
    )
