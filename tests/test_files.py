"""Files appear whole or not at all, as readable as any other."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from canvasmar_rt.errors import InputError
from canvasmar_rt.files import check_writable, refusals, replacing, write_file


def test_a_file_is_replaced_once_its_body_succeeded(tmp_path: Path) -> None:
    path, plain = tmp_path / "a.bin", tmp_path / "plain"
    plain.touch()
    path.write_text("before")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        _ = temporary.write_text("half") / 0
    assert path.read_text() == "before"
    with replacing(path) as temporary:
        temporary.write_text("after")
        temporary.chmod(0o600)  # as safetensors does
        assert (temporary.parent, temporary.suffix) == (tmp_path, ".bin")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert path.stat().st_mode == plain.stat().st_mode
    assert sorted(tmp_path.iterdir()) == [path, plain]


def test_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    check_writable(path)
    assert list(path.parent.iterdir()) == []
    write_file(path, "één\n")
    check_writable(path)
    assert path.read_bytes() == "één\n".encode()
    write_file(path, b"\xff")
    assert path.read_bytes() == b"\xff"


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "a" / "b"):
        for attempt in (check_writable, lambda path: write_file(path, "x")):
            with pytest.raises(InputError, match=r": cannot be written \(.+\)$") as error:
                attempt(path)
            assert str(error.value).startswith(f"{path}: ")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_links_lead_to_the_file_that_is_written(tmp_path: Path) -> None:
    real, link = tmp_path / "a" / "real", tmp_path / "link"
    real.parent.mkdir()
    real.write_text("before")
    link.symlink_to(real)
    check_writable(link)
    write_file(link, "after")
    assert link.is_symlink()
    assert real.read_text() == "after"
    assert list(real.parent.iterdir()) == [real]


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    """And stays one: nothing takes the place of a device."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        check_writable(pipe)
        write_file(pipe, "text")
        assert os.read(reader, 100) == b"text"
        with pytest.raises(OSError, match="it is a device or a pipe"), replacing(pipe):
            pass
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


@pytest.mark.parametrize("error", [OSError, SafetensorError])
def test_a_full_disk_is_said(error: type[Exception], tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a"
    message = r"/folder/a: cannot be written \(No space left\)$"
    with pytest.raises(InputError, match=message), refusals(path):
        raise error("No space left")
    assert path.parent.is_dir()
