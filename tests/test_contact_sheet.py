"""Contact sheets and heat maps: what is drawn is found again in the pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from canvasmar_rt.contact_sheet import contact_sheet, heatmap
from canvasmar_rt.errors import VideoError

Array = NDArray[Any]


def picture(side: int, seed: int) -> Array:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def places(sheet: Array, image: Array, factor: int) -> list[tuple[int, int]]:
    """(y, x) of every exact copy of `image`, enlarged by `factor`, in `sheet`."""
    big = image.repeat(factor, axis=0).repeat(factor, axis=1)
    h, w = big.shape[:2]
    corners = np.argwhere((sheet == big[0, 0]).all(-1))
    return [(y, x) for y, x in corners if np.array_equal(sheet[y : y + h, x : x + w], big)]


def test_pictures_are_enlarged_exactly_and_aligned() -> None:
    frames = [picture(64, i) for i in range(3)]
    maps = [picture(16, 10 + i) for i in range(2)]
    sheet = contact_sheet([("prediction", frames), ("staticness", [None, *maps])])
    assert sheet.dtype == np.uint8
    assert sheet.shape[-1] == 3
    top = [places(sheet, frame, 3) for frame in frames]  # 64 px -> 192 px
    low = [places(sheet, small, 12) for small in maps]  # 16 px -> the same 192 px
    assert all(len(found) == 1 for found in [*top, *low])
    assert len({found[0][0] for found in top}) == 1
    assert low[0][0][0] == low[1][0][0] >= top[0][0][0] + 192
    assert [found[0][1] for found in low] == [found[0][1] for found in top[1:]]
    y, x = low[0][0][0], top[0][0][1]
    blank = sheet[y : y + 192, x : x + 192].reshape(-1, 3)
    assert len(np.unique(blank, axis=0)) == 1


@pytest.mark.parametrize(("side", "factor"), [(16, 12), (64, 3), (96, 2), (128, 1), (200, 1)])
def test_default_scale(side: int, factor: int) -> None:
    image = picture(side, 0)
    assert len(places(contact_sheet([("", [image])]), image, factor)) == 1


def test_scale_title_labels_and_headings() -> None:
    image = np.full((32, 32, 3), 200, np.uint8)
    plain = contact_sheet([("", [image] * 3)], scale=2)
    assert len(places(plain, image, 2)) >= 3
    titled = contact_sheet([("", [image] * 3)], scale=2, title="BAIR push")
    assert titled.shape[0] > plain.shape[0]
    labelled = contact_sheet([("context", [image] * 3)], scale=2)
    assert labelled.shape[1] > plain.shape[1]
    margin = labelled[:, : labelled.shape[1] - plain.shape[1]]
    assert (margin < 100).any()  # ink
    named = contact_sheet([("", [image] * 3)], scale=2, columns=["context -1", "0", "+1"])
    assert named.shape == plain.shape or named.shape[1] > plain.shape[1]
    assert not np.array_equal(named, plain)
    assert not np.array_equal(
        named, contact_sheet([("", [image] * 3)], scale=2, columns=["context -1", "0", "+2"])
    )


def test_rows_may_differ_in_length_and_shape() -> None:
    wide = np.zeros((20, 40, 3), np.uint8)
    sheet = contact_sheet([("a", [wide] * 4), ("two\nlines", [picture(20, 1)]), ("", [])])
    assert len(places(sheet, picture(20, 1), 4)) == 1


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        ([], {}),
        ([("a", [None])], {}),
        ([("a", [np.zeros((4, 4), np.uint8)])], {}),
        ([("a", [np.zeros((4, 4, 3), np.float32)])], {}),
        ([("a", ["picture"])], {}),
        ([("a", [np.zeros((4, 4, 3), np.uint8)])], {"scale": 0}),
        ([("a", [np.zeros((4, 4, 3), np.uint8)])], {"columns": ["0", "1"]}),
        ([("a", [np.zeros((200, 200, 3), np.uint8)] * 100)], {}),
    ],
)
def test_sheets_that_cannot_be_drawn(rows: Any, options: dict[str, Any]) -> None:
    with pytest.raises(VideoError, match=r"contact sheet: .*(expected|must be|need)") as caught:
        contact_sheet(rows, **options)
    assert "\n" not in str(caught.value)


def test_heatmap_goes_from_cool_and_dark_to_warm_and_light() -> None:
    ramp = heatmap(np.linspace(0, 1, 101)[None], (1, 101))[0].astype(float)
    red, green, blue = ramp.T
    assert blue[0] > red[0] + 50  # moving: cool
    assert red[-1] > blue[-1] + 50  # still: warm
    lightness = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    assert (np.diff(lightness) > -0.5).all()
    assert lightness[-1] - lightness[0] > 150


def test_heatmap_keeps_each_value_flat() -> None:
    values = np.array([[0.0, 1.0], [0.5, 0.25]], np.float32)
    big = heatmap(values, (64, 48))
    assert big.shape == (64, 48, 3)
    assert big.dtype == np.uint8
    small = heatmap(values, (2, 2))
    np.testing.assert_array_equal(big, small.repeat(32, axis=0).repeat(24, axis=1))
    assert len(np.unique(small.reshape(-1, 3), axis=0)) == 4
    assert heatmap(values, (5, 7)).shape == (5, 7, 3)  # not a multiple


@pytest.mark.parametrize(
    ("values", "size"),
    [
        (np.zeros((2, 2, 1)), (4, 4)),
        (np.zeros((0, 2)), (4, 4)),
        (np.array([[0.0, np.nan]]), (4, 4)),
        (np.array([[0.0, 1.5]]), (4, 4)),
        (np.array([[-0.1, 1.0]]), (4, 4)),
        (np.zeros((2, 2)), (0, 4)),
    ],
)
def test_heatmap_refuses(values: Array, size: tuple[int, int]) -> None:
    with pytest.raises(VideoError, match=r"heatmap: .*(expected|must be)"):
        heatmap(values, size)
