"""Actions kept with a recording: row i is what was done between frames i and i+1.

An .npz archive holds them as `actions` or `action`. Beside a video `push.mp4` they lie in
`push.actions.npy` or `push.actions.csv`, in a folder of pictures in `actions.npy` or `actions.csv`.
"""

from __future__ import annotations

import warnings
import zipfile
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
    """The file that holds a recording's actions: the archive itself, or one beside it.

    Raises:
        InputError: if the recording is an archive that cannot be read.
    """
    if recording.suffix.lower() == ".npz":
        try:
            with zipfile.ZipFile(recording) as archive:
                members = archive.namelist()
        except PARSER_ERRORS as error:
            raise InputError(f"{recording}: cannot be read ({brief(error)})") from None
        return recording if any(f"{name}.npy" in members for name in ARRAYS) else None
    return next((path for path in _beside(recording) if path.is_file()), None)


def read_actions(recording: Path) -> npt.NDArray[np.float32]:
    """A recording's actions (N, A) float32, A numbers each; values are as they were saved.

    Raises:
        InputError: if there are none, too many, or other things than numbers in rows.
    """
    held = find_actions(recording)
    if held is None:
        if recording.suffix.lower() == ".npz":
            raise InputError(f"{recording}: no array named 'actions' in it")
        names = " or ".join(str(path) for path in _beside(recording))
        raise InputError(f"{recording}: no actions; expected {names}, or an .npz with 'actions'")
    try:
        rows = _read(held)
    except InputError:
        raise
    except PARSER_ERRORS as error:
        raise InputError(f"{held}: actions cannot be read ({brief(error)})") from None
    if rows.dtype.kind not in "iuf":
        raise InputError(
            f"{held}: actions must be real numbers, got {rows.dtype.name}; save them as float32"
        )
    if rows.ndim != 2:
        raise InputError(f"{held}: actions are rows of numbers, (N, A), got shape {rows.shape}")
    with np.errstate(over="ignore"):  # what becomes infinite is refused where it is used
        return rows.astype(np.float32)


def _beside(recording: Path) -> list[Path]:
    if recording.is_dir():
        return [recording / name for name in FILES]
    return [recording.with_suffix(f".{name}") for name in FILES]


def _read(held: Path) -> npt.NDArray[np.generic]:
    if held.suffix.lower() != ".npz":
        _check_size(held, held.stat().st_size)
    if held.suffix == ".csv":
        with warnings.catch_warnings():  # an empty file has no rows, which is refused where used
            warnings.simplefilter("ignore")
            return np.loadtxt(held, np.float64, delimiter=",", ndmin=2, encoding="utf-8")
    if held.suffix == ".npy":
        with held.open("rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    with np.load(held, allow_pickle=False) as archive:
        name = next(name for name in ARRAYS if name in archive.files)
        _check_size(held, archive.zip.getinfo(f"{name}.npy").file_size)
        return np.asarray(archive[name])


def _check_size(held: Path, size: int) -> None:
    if size > MAX_BYTES:
        raise InputError(f"{held}: actions of {size} bytes; at most {MAX_BYTES} are read")
