"""Actions kept with a recording: row i is what was done between frames i and i+1.

An .npz archive holds them as `actions` or `action`. Beside a video `push.mp4` they lie in
`push.actions.npy` or `push.actions.csv`, in a folder of pictures in `actions.npy` or `actions.csv`.
"""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Collection
from pathlib import Path

import numpy as np
import numpy.typing as npt

from canvasmar_rt._video_common import PARSER_ERRORS, brief
from canvasmar_rt.errors import InputError

ARRAYS = "actions", "action"
FILES = "actions.npy", "actions.csv"
MAX_BYTES = 64 << 20


def is_actions(path: Path) -> bool:
    """Whether a file holds the actions of a recording, by its name."""
    return f".{path.name}".endswith(tuple(f".{name}" for name in FILES))


def find_actions(recording: Path) -> Path | None:
    """The file that holds a recording's actions, the archive itself or the first one beside it, if
    there is one that can be found."""
    if _is_archive(recording):
        with contextlib.suppress(*PARSER_ERRORS), zipfile.ZipFile(recording) as archive:
            if _array(archive.namelist()):
                return recording
    return next((path for path in _beside(recording) if os.path.isfile(path)), None)


def read_actions(recording: Path) -> npt.NDArray[np.float32]:
    """A recording's actions (N, A) float32, A numbers each; values are as they were saved.

    Raises:
        InputError: if there are none, too many, they cannot be read, or are other things than
            numbers in rows.
    """
    held = find_actions(recording)
    if held is None:
        names = " or ".join(str(path) for path in _beside(recording))
        raise InputError(
            f"{recording}: no actions; expected {names}, or an .npz with an array 'actions'"
        )
    try:
        rows = _read(held)
    except InputError:
        raise
    except PARSER_ERRORS as error:
        form = ""
        if held.suffix == ".csv":
            form = "; expected rows of numbers with commas between them, no heading"
        raise InputError(f"{held}: actions cannot be read ({brief(error)}){form}") from None
    if rows.dtype.kind not in "iuf":
        raise InputError(
            f"{held}: actions must be real numbers, got {rows.dtype.name}; save them as float32"
        )
    if rows.ndim != 2:
        raise InputError(
            f"{held}: actions have shape {rows.shape}; save them as (N, A), a row for each frame"
        )
    with np.errstate(over="ignore"):  # what becomes infinite is refused where it is used
        return rows.astype(np.float32)


def _is_archive(recording: Path) -> bool:
    return recording.suffix.lower() == ".npz"


def _array(members: Collection[str]) -> str | None:
    return next((name for name in ARRAYS if f"{name}.npy" in members), None)


def _beside(recording: Path) -> list[Path]:
    if os.path.isdir(recording):
        return [recording / name for name in FILES]
    return [recording.with_suffix(f".{name}") for name in FILES]


def _read(held: Path) -> npt.NDArray[np.generic]:
    if _is_archive(held):
        with np.load(held, allow_pickle=False) as archive:
            name = _array(archive.zip.namelist())
            assert name is not None
            _check_size(held, archive.zip.getinfo(f"{name}.npy").file_size)
            return np.asarray(archive[name])
    _check_size(held, held.stat().st_size)
    if held.suffix == ".npy":
        with held.open("rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    lines = held.read_text(encoding="utf-8-sig").rstrip().splitlines()
    if not lines:
        return np.empty((0, 1))
    if "" in (stripped := [line.strip() for line in lines]):
        number = stripped.index("") + 1
        raise InputError(f"{held}: line {number} is empty; every row belongs to a frame")
    return np.loadtxt(lines, np.float64, comments=None, delimiter=",", ndmin=2)


def _check_size(held: Path, size: int) -> None:
    if size > MAX_BYTES:
        raise InputError(f"{held}: actions of {size} bytes; at most {MAX_BYTES} are read")
