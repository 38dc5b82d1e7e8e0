"""Readers of the paper's data sets, and of any folder of videos, as endless streams of clips.

Every reader is a table of recordings (`Recordings`) from which `RecordedClips` cuts windows, and
all take the same options (`ClipOptions`). One pass over a data set shows each recording once, at
a random window; pass e has an order of its own. So `clips` is also the papers' protocol for FVD:

  - BAIR, from the first frame: `test_clips()` of the test split; debiased: pass e of `clips()` on
    the test split is repeat e, a random window of each of the 256 trajectories;
  - UCF-101, Kinetics-600: `clips(0, n)` on the test split, n videos at random windows.

A recording that is missing, broken or too short is left out, named once in `skipped`, and the
next good one in order takes its place: nothing in a data set stops a run, unless nothing is left.

Pictures are cropped to the middle and resized as `canvasmar_rt.video.fit` does for prediction, so
that a model is trained on the pixels it will be given.

Notation: T frames of a clip, H rows, W columns, A numbers of an action.
"""

from __future__ import annotations

import csv
import inspect
import io
import math
import os
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, NotRequired, Protocol, TypedDict, TypeVar, Unpack

import numpy as np
import torch
from numpy.typing import NDArray

from canvasmar_rt._video_archives import array_header, listing, natural, open_member
from canvasmar_rt._video_common import ARCHIVE_SUFFIXES, PARSER_ERRORS, brief
from canvasmar_rt._video_streams import frame_stamps, open_video
from canvasmar_rt.actions import is_actions, read_actions
from canvasmar_rt.config import parsed
from canvasmar_rt.errors import ConfigError, InputError
from canvasmar_rt.video import (
    CLIP_SUFFIXES,
    IMAGE_SUFFIXES,
    UNTIMED_FPS,
    VIDEO_SUFFIXES,
    Pixels,
    fit,
    read_clip,
)
from training.clips import Clips
from training.tfrecord import Example, Record, read_record, scan_records

Actions = NDArray[np.float32]
Window = tuple[Pixels, Actions | None]
"""Frames (T, H, W, 3) and the actions (T-1, A) between them, None for data without actions."""

IN_A_ROW = 1000
"""Recordings in random order of which none can be used: no other one is looked for."""

_ORDER_STREAM, _START_STREAM = 0, 1
_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


class ClipOptions(TypedDict):
    """What every reader takes. A clip is `frames` pictures of `height` x `width` pixels."""

    frames: int
    height: int
    width: int
    seed: NotRequired[int]
    stride: NotRequired[int]
    """Every how many-th frame of a recording is taken; 1 for data with actions."""
    workers: NotRequired[int]
    """Threads that read a batch together; the clips do not depend on it."""
    on_skip: NotRequired[Callable[[str, str], None]]
    """Called once for each recording left out, with its name and the reason."""


class Recording(Protocol):
    """One opened recording."""

    @property
    def length(self) -> int:
        """Frames it holds, as far as can be told without decoding them."""
        ...

    def window(self, start: int, frames: int, stride: int) -> Window:
        """Frames start, start + stride, .. at the clips' size.

        Raises:
            InputError: the recording is damaged or ends earlier.
        """
        ...


class Recordings(Protocol):
    """A data set's recordings, numbered in the order of its files."""

    def __len__(self) -> int: ...

    def name(self, item: int) -> str:
        """A name that tells a person where the recording lies."""
        ...

    def open(self, item: int) -> Recording:
        """Raises InputError if it is missing, damaged or of another kind."""
        ...


class RecordedClips:
    """Windows of recordings at random, without end: a `training.clips.ClipSource`.

    Attributes:
        frames, height, width, action_dim: size of a clip; actions per pixel frame, 0 for none.
        skipped: name -> reason of each recording left out so far.
    """

    def __init__(
        self,
        recordings: Recordings,
        *,
        frames: int,
        height: int,
        width: int,
        action_dim: int = 0,
        seed: int = 0,
        stride: int = 1,
        workers: int = 1,
        on_skip: Callable[[str, str], None] | None = None,
        missing: Mapping[str, str] | None = None,
    ) -> None:
        self.frames, self.height, self.width = frames, height, width
        self.action_dim = action_dim
        self.skipped: dict[str, str] = {}
        self._recordings = recordings
        self._seed, self._stride, self._workers = seed, stride, workers
        self._on_skip, self._telling = on_skip, threading.Lock()
        self._order = lru_cache(maxsize=4)(self._new_order)
        self._skip(missing or {})

    def __len__(self) -> int:
        """Recordings of one pass, the good and the not yet found to be bad."""
        return len(self._recordings)

    def clips(self, first: int, count: int) -> Clips:
        """Clips first ... first + count - 1, whatever was asked for before.

        Raises:
            InputError: the range is empty or negative, or no recording can be used.
        """
        if first < 0 or count < 1:
            raise InputError(f"expected clips from 0 on, at least one; got {count} from {first}")
        return _batch(list(self._share(self._draw, range(first, first + count))))

    def test_clips(self, batch: int = 16) -> Iterator[Clips]:
        """The beginning of every recording in order, `batch` at a time (fewer at the end).

        Raises:
            InputError: the batch is empty, or no recording can be used.
        """
        if batch < 1:
            raise InputError(f"expected batches of at least one clip, got {batch}")

        def cut(item: int) -> tuple[Window | None, dict[str, str]]:
            try:
                return self._cut(item, 0.0), {}
            except InputError as error:
                return None, self._reason(item, error)

        windows: list[Window] = []
        none_yet = True
        for begin in range(0, len(self), batch):
            for taken, bad in self._share(cut, range(begin, min(begin + batch, len(self)))):
                self._skip(bad)
                if taken is not None:
                    windows.append(taken)
            if len(windows) >= batch:
                yield _batch(windows[:batch])
                windows, none_yet = windows[batch:], False
        if windows:
            yield _batch(windows)
        elif none_yet:
            raise self._nothing_left(self.skipped)

    def _draw(self, clip: int) -> Window:
        """Clip number `clip`; recordings found bad on the way to it are told at once."""
        turn, place = divmod(clip, len(self))
        order = self._order(turn)
        share = float(np.random.default_rng([self._seed, _START_STREAM, clip]).random())
        bad: dict[str, str] = {}
        for step in range(min(len(self), IN_A_ROW)):
            item = int(order[(place + step) % len(self)])
            try:
                return self._cut(item, share)
            except InputError as error:
                reason = self._reason(item, error)
                self._skip(reason)
                bad |= reason
        raise self._nothing_left(bad)

    def _new_order(self, turn: int) -> NDArray[np.int64]:
        generator = np.random.default_rng([self._seed, _ORDER_STREAM, turn])
        return generator.permutation(len(self))

    def _cut(self, item: int, share: float) -> Window:
        """The window that leaves `share`, within [0, 1), of the spare frames before it."""
        recording = self._recordings.open(item)
        span = (self.frames - 1) * self._stride + 1
        spare = recording.length - span
        if spare < 0:
            raise InputError(f"expected at least {span} frames, got {recording.length}")
        start = int(share * (spare + 1))
        try:
            return recording.window(start, self.frames, self._stride)
        except InputError:
            # Damage, or a header that promised more; what decides on a recording is its beginning.
            if start == 0:
                raise
            return recording.window(0, self.frames, self._stride)

    def _share(self, job: Callable[[_Job], _Result], items: Sequence[_Job]) -> Iterator[_Result]:
        if self._workers == 1 or len(items) == 1:
            yield from map(job, items)
            return
        with ThreadPoolExecutor(min(self._workers, len(items))) as pool:
            yield from pool.map(job, items)

    def _reason(self, item: int, error: InputError) -> dict[str, str]:
        name = self._recordings.name(item)
        return {name: str(error).removeprefix(f"{name}: ")}

    def _skip(self, bad: Mapping[str, str]) -> None:
        with self._telling:
            for name, reason in bad.items():
                if name not in self.skipped:
                    self.skipped[name] = reason
                    if self._on_skip is not None:
                        self._on_skip(name, reason)

    def _nothing_left(self, bad: Mapping[str, str]) -> InputError:
        name, reason = next(iter(bad.items()))
        which = f"none of the {len(self)} recordings"
        if len(bad) < len(self):
            which = f"of the {len(self)} recordings none of {len(bad)} in a row"
        return InputError(
            f"{which} can be used, the first is {name}: {reason};"
            " check the path, the clip length and that the data were copied whole"
        )


# ---------------------------------------------------------------------------------------------
# Readers


def bair_tfrecord(
    root: Path,
    *,
    split: Literal["train", "test"] = "train",
    view: Literal["image_aux1", "image_main"] = "image_aux1",
    action_dim: int = 4,
    **options: Unpack[ClipOptions],
) -> RecordedClips:
    """BAIR robot pushing as published: `softmotion30_44k/{train,test}/*.tfrecords`.

    Each record is a trajectory of 30 pictures of 64 x 64 from two cameras; `image_aux1` is the
    one that published results are on. `root` is `softmotion30_44k` or the folder that holds it.

    Args:
        action_dim: 4, or 0 to leave the actions out.

    Raises:
        ConfigError: an option is out of range.
        InputError: no record is there.
    """
    _check(options, action_dim)
    _one_of("view", view, ("image_aux1", "image_main"))
    _one_of("action_dim", action_dim, (0, 4))
    folder = _split_folder(root, split, ("", "softmotion30_44k"))
    files = [path for path in _walk(folder) if path.suffix in (".tfrecords", ".tfrecord")]
    records: list[Record] = []
    damaged: dict[str, str] = {}
    for path in files:
        found, wrong = scan_records(path)
        records += found
        if wrong is not None:
            damaged[str(path)] = wrong
    _require(records, folder, "whole records in *.tfrecords files", damaged)
    table = _Trajectories(records, view, action_dim, (options["height"], options["width"]))
    return RecordedClips(table, action_dim=action_dim, missing=damaged, **options)


def bair_frames(
    root: Path,
    *,
    split: Literal["train", "test"] = "train",
    action_dim: int = 0,
    **options: Unpack[ClipOptions],
) -> RecordedClips:
    """Folders of numbered pictures, one for each trajectory, at any depth below `root/split`.

    This is how BAIR is kept by those who convert it, `processed_data/{train,test}/../0.png`.

    Args:
        action_dim: A, if all have actions, kept as `canvasmar_rt.actions` says, as many rows as
            frames, or one less.

    Raises:
        ConfigError: an option is out of range.
        InputError: no picture is there.
    """
    _check(options, action_dim)
    folder = _split_folder(root, split, ("", "processed_data"))
    images = (path for path in _walk(folder) if path.suffix.lower() in IMAGE_SUFFIXES)
    folders = list(dict.fromkeys(path.parent for path in images))
    _require(folders, folder, "folders of numbered pictures", {})
    table = _Videos(folders, (options["height"], options["width"]), action_dim)
    return RecordedClips(table, action_dim=action_dim, **options)


def ucf101(
    root: Path,
    *,
    split: Literal["train", "test"] = "train",
    fold: Literal[1, 2, 3] = 1,
    lists: Path | None = None,
    **options: Unpack[ClipOptions],
) -> RecordedClips:
    """UCF-101 by its official lists, `{train,test}list0{1,2,3}.txt`.

    Args:
        root: the folder of class folders, or the one that holds it as `UCF-101`.
        lists: the folder of lists; by default `root/ucfTrainTestlist`.

    Raises:
        ConfigError: an option is out of range.
        InputError: the list or all of its videos are missing.
    """
    _check(options)
    _one_of("split", split, ("train", "test"))
    _one_of("fold", fold, (1, 2, 3))
    file = (root / "ucfTrainTestlist" if lists is None else lists) / f"{split}list0{fold}.txt"
    lines = [line.split()[0] for line in _text(file).splitlines() if line.strip()]
    videos = root / "UCF-101" if (root / "UCF-101").is_dir() else root
    wanted: list[tuple[str, Path | None]] = []
    for line in lines:
        path = videos / line
        wanted.append((str(path), path if os.path.isfile(path) else None))
    return _listed(wanted, file, f"the videos lie in {videos}", options)


def kinetics600(
    root: Path,
    *,
    split: str = "train",
    table: Path | None = None,
    **options: Unpack[ClipOptions],
) -> RecordedClips:
    """Kinetics by the official tables: label, youtube_id, time_start, time_end, split.

    A row's video is `{youtube_id}_{start:06d}_{end:06d}` with any video suffix, at any depth
    below `root`; a column `path` (relative to `root`) goes before that. Rows whose `split` is
    another one are passed over. Videos that were never downloaded count as skipped.

    Args:
        table: the CSV file, with the column `split`; by default `root/{split}.csv`.

    Raises:
        ConfigError: an option is out of range.
        InputError: the table is missing or of another form, or all of its videos are missing.
    """
    _check(options)
    file = root / f"{split}.csv" if table is None else table
    rows = csv.DictReader(io.StringIO(_text(file), newline=""))
    wanted: list[tuple[str, Path | None]] = []
    others: set[str] = set()
    try:
        columns = set(rows.fieldnames or ())
        if table is not None and "split" not in columns:
            raise InputError(
                f"{file}: one table for all splits needs a column split (train, test); without it "
                "the clips that are held out would be trained on; or name the tables "
                f"{root}/train.csv and so on"
            )
        if "path" not in columns and not {"youtube_id", "time_start", "time_end"} <= columns:
            raise InputError(
                f"{file}: expected columns youtube_id, time_start, time_end (or path), got"
                f" {', '.join(sorted(columns)) or 'none'}; give the data set's own CSV table"
            )
        at_hand = (
            {}
            if "path" in columns
            else {p.stem: p for p in _walk(root) if p.suffix.lower() in VIDEO_SUFFIXES}
        )
        for row in rows:
            own = row.get("split")
            if table is not None and not own:
                raise InputError(
                    f"{file}: line {rows.line_num} has no split; it would be trained on and held "
                    "out"
                )
            if own and own != split:
                others.add(own)
                continue
            if "path" in columns:
                path = root / (row["path"] or "?")
                wanted.append((str(path), path if os.path.isfile(path) else None))
                continue
            try:
                start, end = (round(float(row[key])) for key in ("time_start", "time_end"))
                stem = f"{row['youtube_id']}_{start:06d}_{end:06d}"
            except (TypeError, ValueError, OverflowError):
                stem = f"line {rows.line_num} of {file.name}"
            wanted.append((str(root / stem), at_hand.get(stem)))
    except csv.Error as error:
        raise InputError(f"{file}: line {rows.line_num} is no CSV ({error})") from error
    if others and not wanted:
        raise InputError(
            f"{file}: its column split has {', '.join(map(repr, sorted(others)[:4]))} and no row "
            f"of {split!r}; rename the split there, or drop the column from a table of one split"
        )
    return _listed(wanted, file, f"the videos lie below {root}", options)


def videos(
    root: Path, *, split: str = "", action_dim: int = 0, **options: Unpack[ClipOptions]
) -> RecordedClips:
    """Every video file and .npz/.npy archive below `root/split`, at any depth.

    Args:
        split: a folder within `root`, if it has such.
        action_dim: A, if all have actions, kept as `canvasmar_rt.actions` says, as many rows as
            frames, or one less.

    Raises:
        ConfigError: an option is out of range.
        InputError: no such file is there.
    """
    _check(options, action_dim)
    _folder(root)
    folder = _folder(root / split)
    clips = (path for path in _walk(folder) if path.suffix.lower() in CLIP_SUFFIXES)
    files = [path for path in clips if not is_actions(path)]
    _require(files, folder, "video files or .npz archives", {})
    table = _Videos(files, (options["height"], options["width"]), action_dim)
    return RecordedClips(table, action_dim=action_dim, **options)


READERS: dict[str, Callable[..., RecordedClips]] = {
    "bair-tfrecord": bair_tfrecord,
    "bair-frames": bair_frames,
    "ucf101": ucf101,
    "kinetics600": kinetics600,
    "videos": videos,
}


def reader_options(name: str) -> set[str]:
    """Names of the options that the reader called `name` takes.

    Raises:
        ConfigError: no such reader.
    """
    if name not in READERS:
        raise ConfigError(
            f"no data set reader is called {name!r}; choose from {', '.join(READERS)}"
        )
    own = set(inspect.signature(READERS[name]).parameters) - {"root", "options"}
    return own | set(ClipOptions.__annotations__)


def make_source(name: str, root: Path, **options: Any) -> RecordedClips:
    """The reader called `name` in `READERS` on `root`, with the options it takes.

    Raises:
        ConfigError: no such reader, an option that it does not know, or one out of range.
        InputError: nothing to read is there.
    """
    known = reader_options(name)
    if unknown := sorted(set(options) - known):
        raise ConfigError(
            f"{name}: unknown option {', '.join(unknown)}; it takes {', '.join(sorted(known))}"
        )
    if absent := sorted({"frames", "height", "width"} - set(options)):
        raise ConfigError(f"{name}: {', '.join(absent)} must be given")
    for key in {"lists", "table"} & set(options):
        options[key] = Path(str(options[key]))
    return READERS[name](Path(root), **options)


@dataclass(frozen=True)
class DataSet:
    """A data set as a command line names it: a reader or `toytable`, where it lies, and options of
    the reader."""

    name: str
    root: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)

    TAKEN: ClassVar = {"name", "root", "frames", "height", "width", "seed", "split", "on_skip"}

    @classmethod
    def of(cls, name: str, root: Path | None, assignments: Sequence[str] | None) -> DataSet:
        """
        Raises:
            ConfigError: an assignment is not name=value, or of what the command itself decides.
        """
        options = dict(parsed(assignments or ()))
        for key in options.keys() & {"lists", "table"}:  # so that they are found from anywhere
            options[key] = str(Path(str(options[key])).absolute())
        if taken := options.keys() & cls.TAKEN:
            raise ConfigError(f"--set-data {min(taken)}: is decided by the command itself")
        return cls(name, root, options)

    @classmethod
    def of_latents(
        cls,
        about: Mapping[str, Any],
        name: str,
        root: Path | None,
        assignments: Sequence[str] | None,
    ) -> DataSet:
        """As given, and where it is not, what the latents were made of."""
        known = about.get("name", "toytable")
        if name not in ("", known):
            return cls.of(name, root, assignments)
        if root is None and "root" in about:
            root = Path(about["root"])
        given = cls.of(known, root, assignments)
        return replace(given, options=about.get("options", {}) | given.options)

    @property
    def usual(self) -> bool:
        """Whether the reader cuts what it cuts by default, wherever its files lie."""
        return self.options.keys() <= {"workers", "lists", "table", "action_dim"}

    def described(self) -> dict[str, Any]:
        """What decides on the clips."""
        options = {k: v for k, v in self.options.items() if k != "workers"}
        return (
            {"name": self.name}
            | ({} if self.root is None else {"root": str(self.root.absolute())})
            | ({"options": options} if options else {})
        )

    def source(self, **options: Any) -> RecordedClips:
        """
        Raises:
            ConfigError, InputError: as `make_source`, or there is no root.
        """
        free = reader_options(self.name) - self.TAKEN
        if self.root is None:
            raise InputError(f"--data {self.name} needs --root, the directory of the data set")
        if unknown := sorted(self.options.keys() - free):
            raise ConfigError(
                f"--set-data {unknown[0]}: {self.name} takes {', '.join(sorted(free))}"
            )
        return make_source(self.name, self.root, **options, **self.options)


# ---------------------------------------------------------------------------------------------
# Recordings


@dataclass(frozen=True)
class _Trajectories:
    """Records of BAIR's files."""

    records: Sequence[Record]
    view: str
    action_dim: int
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.records)

    def name(self, item: int) -> str:
        return str(self.records[item])

    def open(self, item: int) -> _Trajectory:
        record = self.records[item]
        example = Example(read_record(record), str(record))
        return _Trajectory(example, self.view, self.action_dim, self.size)


@dataclass(frozen=True)
class _Trajectory:
    example: Example
    view: str
    action_dim: int
    size: tuple[int, int]
    side: int = 64  # a record holds bare pixels and does not state their shape

    @property
    def length(self) -> int:
        length = 0
        while self._picture(length) in self.example:
            length += 1
        return length

    def window(self, start: int, frames: int, stride: int) -> Window:
        which = range(start, start + frames * stride, stride)
        shape = (self.side, self.side, 3)
        pictures = [self.example.bytes(self._picture(i), math.prod(shape)) for i in which]
        pixels = np.frombuffer(b"".join(pictures), np.uint8).reshape(-1, *shape)
        actions = None
        if self.action_dim:
            taken = [self.example.floats(f"{i}/action", self.action_dim) for i in which[:-1]]
            actions = np.array(taken, np.float32).reshape(-1, self.action_dim)
        return fit(pixels, self.size), actions

    def _picture(self, i: int) -> str:
        return f"{i}/{self.view}/encoded"


@dataclass(frozen=True)
class _Videos:
    """Whatever `read_clip` reads: video files, archives, folders of pictures."""

    paths: Sequence[Path]
    size: tuple[int, int]
    action_dim: int = 0

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, item: int) -> str:
        return str(self.paths[item])

    def open(self, item: int) -> _Video:
        path = self.paths[item]
        with _parsing(path):
            return _Video(
                path, self.size, self.action_dim, *_frame_times(path, exact=self.action_dim > 0)
            )


@dataclass(frozen=True, eq=False)
class _Video:
    path: Path
    size: tuple[int, int]
    action_dim: int
    times: NDArray[np.float64]
    slack: float

    @property
    def length(self) -> int:
        return len(self.times)

    def window(self, start: int, frames: int, stride: int) -> Window:
        span = (frames - 1) * stride + 1
        seconds = 0.0
        if start:
            # Half way to the next frame, where rounding of time stamps does not matter; if that is
            # no further off than they are rounded, where `read_clip` still takes this one.
            half = float(np.diff(self.times[start : start + 2]).sum()) / 2
            seconds = float(self.times[start]) + (half if half > self.slack else -self.slack / 2)
        clip = read_clip(self.path, size=self.size, start=seconds, max_frames=span, min_frames=span)
        actions = None
        if self.action_dim:
            if clip.skipped:
                raise InputError(f"{self.path}: damaged frames; which action is whose is unknown")
            table = read_actions(self.path)
            _check_actions(self.path, table, self.length, self.action_dim)
            actions = table[start : start + frames - 1]
        return clip.frames[::stride], actions


@contextmanager
def _parsing(path: Path) -> Iterator[None]:
    """Whatever the parsers raise on broken input becomes an InputError that names the file."""
    try:
        yield
    except InputError:
        raise
    except PARSER_ERRORS as error:
        raise InputError(f"{path}: cannot be read ({brief(error)})") from error


def _frame_times(path: Path, *, exact: bool) -> tuple[NDArray[np.float64], float]:
    """When each frame comes on screen, in seconds from the first, read without decoding unless
    `exact` needs it; and how far that may be rounded."""
    if path.is_dir():
        return np.arange(len(listing(path)[0])) / UNTIMED_FPS, 0.0
    if not path.is_file():
        raise InputError(f"{path}: expected a file, got none, or a device, pipe or socket")
    if path.suffix.lower() in ARCHIVE_SUFFIXES:
        return np.arange(_archive_length(path)) / UNTIMED_FPS, 0.0
    with open_video(path, timed=False) as track:  # its checks of what the file is
        fps, slack = track.fps, track.slack
    stamps, tick = frame_stamps(path, exact=exact)
    if tick is None or any(stamp is None for stamp in stamps) or not stamps:
        return np.arange(len(stamps)) / fps, slack
    times: NDArray[np.float64] = np.sort(np.array(stamps, np.float64)) * tick
    return times - float(times[0]), slack


def _archive_length(path: Path) -> int:
    if path.suffix.lower() == ".npy":
        with path.open("rb") as file:
            return int((array_header(path, path.name, file).shape or (0,))[0])
    with zipfile.ZipFile(path) as archive, open_member(path, archive, None) as (header, _, _):
        return int((header.shape or (0,))[0])


def _check_actions(path: Path, table: Actions, frames: int, action_dim: int) -> None:
    if table.shape not in ((frames, action_dim), (frames - 1, action_dim)):
        raise InputError(
            f"{path}: {frames} frames go with actions ({frames} or {frames - 1}, {action_dim}), "
            f"got {table.shape}"
        )
    finite = np.isfinite(table).all(axis=1)
    if not finite.all():
        raise InputError(
            f"{path}: row {int(finite.argmin())} of its actions (from 0) is not finite"
        )


# ---------------------------------------------------------------------------------------------
# Options, files, lists


def _check(options: ClipOptions, action_dim: int = 0) -> None:
    seed, stride = options.get("seed", 0), options.get("stride", 1)
    workers = options.get("workers", 1)
    for name, value in (("stride", stride), ("workers", workers), ("action_dim", action_dim)):
        if type(value) is not int:
            raise ConfigError(f"{name} must be a whole number, got {value!r}")
    checks = {
        "frames must be at least 1": options["frames"] >= 1,
        "height and width must be at least 1": min(options["height"], options["width"]) >= 1,
        "seed must not be negative": seed >= 0,
        "stride must be at least 1": stride >= 1,
        "workers must be at least 1": workers >= 1,
        "action_dim must not be negative": action_dim >= 0,
        "stride must be 1 for data with actions, which belong to single frames": (
            stride == 1 or action_dim == 0
        ),
    }
    for rule, holds in checks.items():
        if not holds:
            given = {k: v for k, v in options.items() if isinstance(v, int)}
            raise ConfigError(f"{rule}; got {given | {'action_dim': action_dim}}")


def _one_of(what: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise ConfigError(f"{what} must be one of {', '.join(map(str, allowed))}; got {value!r}")


def _folder(path: Path) -> Path:
    if not path.is_dir():
        what = "is a file" if path.exists() else "no such folder"
        raise InputError(f"{path}: {what}; check the path, or copy the data there")
    return path


def _split_folder(root: Path, split: str, below: Sequence[str]) -> Path:
    _one_of("split", split, ("train", "test"))
    _folder(root)
    return _folder(next((d for b in below if (d := root / b / split).is_dir()), root / split))


def _walk(root: Path) -> Iterator[Path]:
    """Files below `root` in natural order, through links to folders but never in a circle."""
    seen: set[tuple[int, int]] = set()
    for folder, below, names in os.walk(root, followlinks=True):
        state = os.stat(folder)
        if (state.st_dev, state.st_ino) in seen:
            below.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        below[:] = sorted((name for name in below if not name.startswith(".")), key=natural)
        for name in sorted(names, key=natural):
            if not name.startswith("."):
                yield Path(folder, name)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read ({brief(error)}); it comes with the data set, give its path"
        ) from error


def _require(found: Sequence[object], folder: Path, what: str, bad: Mapping[str, str]) -> None:
    if not found:
        first = next((f" ({name}: {reason})" for name, reason in bad.items()), "")
        raise InputError(f"{folder}: expected {what}, found none{first}; check the path")


def _listed(
    wanted: Sequence[tuple[str, Path | None]], file: Path, where: str, options: ClipOptions
) -> RecordedClips:
    """Clips of the videos that a list names; those not there are left out from the start."""
    if not wanted:
        raise InputError(f"{file}: expected a list of videos, found none in it")
    there = [path for _, path in wanted if path is not None]
    missing = {name: "no such file" for name, path in wanted if path is None}
    if not there:
        raise InputError(
            f"{file}: none of its {len(wanted)} videos is there, the first would be"
            f" {wanted[0][0]}; check that {where}"
        )
    table = _Videos(there, (options["height"], options["width"]))
    return RecordedClips(table, missing=missing, **options)


def _batch(windows: Sequence[Window]) -> Clips:
    frames = torch.from_numpy(np.stack([pixels for pixels, _ in windows]))
    taken = [actions for _, actions in windows if actions is not None]
    return Clips(frames=frames, actions=torch.from_numpy(np.stack(taken)) if taken else None)
