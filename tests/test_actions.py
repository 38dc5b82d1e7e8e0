"""Actions kept in an archive, or beside a recording."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from canvasmar_rt import actions as module
from canvasmar_rt.actions import find_actions, is_actions, read_actions
from canvasmar_rt.errors import InputError

ROWS = np.arange(24.0).reshape(8, 3) / 7


def save_csv(path: Path) -> None:
    np.savetxt(path, ROWS, delimiter=",", fmt="%.9g")


@pytest.mark.parametrize(
    ("recording", "file", "save"),
    [
        ("push.npz", "push.npz", lambda p: np.savez(p, actions=ROWS, frames=ROWS)),
        ("push.npz", "push.npz", lambda p: np.savez_compressed(p, action=np.asfortranarray(ROWS))),
        ("push.npz", "push.actions.csv", save_csv),
        ("push.mp4", "push.actions.npy", lambda p: np.save(p, ROWS)),
        ("push.mp4", "push.actions.csv", save_csv),
        ("push.npy", "push.actions.csv", save_csv),
        ("pictures", "pictures/actions.npy", lambda p: np.save(p, ROWS)),
        ("pictures", "pictures/actions.csv", save_csv),
    ],
)
def test_actions_of_every_kind_of_recording(
    recording: str, file: str, save: Callable[[Path], None], tmp_path: Path
) -> None:
    (tmp_path / "pictures").mkdir()
    save(tmp_path / file)
    assert find_actions(tmp_path / recording) == tmp_path / file
    read = read_actions(tmp_path / recording)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, ROWS.astype(np.float32))


def test_a_file_of_actions_is_known_by_its_name() -> None:
    names = ("actions.npy", "push.actions.npy", "push.actions.csv", "push.npy", "reactions.npy")
    assert [is_actions(Path(name)) for name in names] == [True, True, True, False, False]


@pytest.mark.parametrize(
    ("recording", "write", "reason"),
    [
        (f"{'a' * 250}.mp4", lambda f: None, "no actions; expected"),
        (".", lambda f: (f / "actions.csv").write_text("1;2\n"), "numbers with commas between"),
        (".", lambda f: (f / "actions.csv").write_text("1\n2\n \n4\n"), "line 3 is empty; every"),
        (".", lambda f: (f / "actions.csv").write_text("1\n# lost\n3\n"), "cannot be read"),
        ("a.mp4", lambda f: None, r"a\.mp4: no actions; expected .*a\.actions\.npy or .*csv"),
        (".", lambda f: None, r"no actions; expected .*actions\.npy"),
        ("a.npz", lambda f: np.savez(f / "a.npz", frames=ROWS), r"no actions; .*a\.actions"),
        ("a.npz", lambda f: (f / "a.npz").write_bytes(b"PK half"), "no actions; expected"),
        (".", lambda f: (f / "actions.npy").write_bytes(b"\x93NUMPY"), "actions cannot be read"),
        (".", lambda f: (f / "actions.npy").write_bytes(b"PK"), "actions cannot be read"),
        (".", lambda f: np.save(f / "actions.npy", np.array([{}])), "actions cannot be read"),
        (".", lambda f: (f / "actions.csv").write_text("x,y\n1,2\n"), "actions cannot be read"),
        (".", lambda f: (f / "actions.csv").write_text("1,2\n1\n"), "actions cannot be read"),
        (".", lambda f: (f / "actions.csv").write_bytes(b"\xff\xfe1,2"), "actions cannot be read"),
        (".", lambda f: np.save(f / "actions.npy", ROWS[0]), r"shape \(3,\); save them as"),
    ],
)  # fmt: skip
def test_actions_that_cannot_be_had_say_why(
    recording: str, write: Callable[[Path], object], reason: str, tmp_path: Path
) -> None:
    write(tmp_path)
    with pytest.raises(InputError, match=reason):
        read_actions(tmp_path / recording)


@pytest.mark.parametrize(
    "dtype", ["complex64", "bool", "S4", "datetime64[s]"], ids=lambda dtype: dtype[:4]
)
def test_actions_of_another_kind_are_refused(dtype: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", actions=np.zeros((8, 4), dtype))
    with pytest.raises(InputError, match=r"actions must be real numbers, got .* save them"):
        read_actions(tmp_path / "a.npz")


@pytest.mark.filterwarnings("error")
def test_actions_beyond_float32_become_infinite_in_silence(tmp_path: Path) -> None:
    """A rollout refuses them by its own message."""
    np.savez(tmp_path / "a.npz", actions=np.full((8, 4), 1e308))
    assert np.isinf(read_actions(tmp_path / "a.npz")).all()
    np.savez(tmp_path / "a.npz", actions=np.full((8, 4), -3, np.int8))
    assert (read_actions(tmp_path / "a.npz") == -3).all()


def test_a_table_as_a_spreadsheet_writes_it(tmp_path: Path) -> None:
    (tmp_path / "actions.csv").write_bytes(b"\xef\xbb\xbf1, 2\r\n3,4\r\n\r\n")
    np.testing.assert_array_equal(read_actions(tmp_path), [[1, 2], [3, 4]])


@pytest.mark.filterwarnings("error")
def test_an_empty_table_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "actions.csv").write_text("")
    assert len(read_actions(tmp_path)) == 0


def test_more_than_anyone_needs_is_not_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 100)
    np.savez_compressed(tmp_path / "a.npz", actions=np.zeros((100, 100)))
    np.save(tmp_path / "b.actions.npy", ROWS)
    for name in ("a.npz", "b.mp4"):
        with pytest.raises(InputError, match="at most 100 are read"):
            read_actions(tmp_path / name)


def test_one_number_a_row_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "actions.csv").write_text("1\n2\n3\n")
    np.testing.assert_array_equal(read_actions(tmp_path), [[1], [2], [3]])
    (tmp_path / "actions.csv").write_text("1,2\n")
    np.testing.assert_array_equal(read_actions(tmp_path), [[1, 2]])


def test_an_archive_is_one_in_capitals_too(tmp_path: Path) -> None:
    with (tmp_path / "PUSH.NPZ").open("wb") as file:
        np.savez(file, actions=np.ones((2, 3)))
    assert find_actions(tmp_path / "PUSH.NPZ") == tmp_path / "PUSH.NPZ"
    assert read_actions(tmp_path / "PUSH.NPZ").shape == (2, 3)
