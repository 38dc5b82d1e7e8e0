"""Files that appear under their name whole or not at all."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from canvasmar_rt.errors import InputError


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary name beside `target`, which takes its place once the body has succeeded. A link
    stays one: the file it leads to is replaced.

    Raises:
        OSError: if `target` is something else than a file, such as a device, which would be gone.
    """
    target = Path(os.path.realpath(target))
    if target.exists() and not target.is_file():
        raise OSError("it is a directory" if target.is_dir() else "it is a device or a pipe")
    temporary = target.with_name(f".{secrets.token_hex(8)}{target.suffix}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes files that only their owner can read
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, data: str | bytes) -> None:
    """Write a file whole or not at all; its folder is made. A device or a pipe, such as
    /dev/stdout, is written to.

    Raises:
        InputError: if it cannot be written.
    """
    raw = data.encode() if isinstance(data, str) else data
    with refusals(path):
        if is_stream(path):
            path.write_bytes(raw)
            return
        with replacing(path) as temporary:
            temporary.write_bytes(raw)


def check_writable(path: Path) -> None:
    """See that a file can be written, before the work it will hold; its folder is made.

    Raises:
        InputError: if it cannot be.
    """
    with refusals(path):
        if path.is_dir():
            raise IsADirectoryError("it is a directory")
        if not is_stream(path):
            tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(path))).close()


def is_stream(path: Path) -> bool:
    """Whether this is a device or a pipe."""
    return path.exists() and not path.is_file() and not path.is_dir()


@contextmanager
def refusals(path: Path) -> Iterator[None]:
    """For what writes `path` in its body: its folder is made, and what goes wrong, as on a full
    disk, is an InputError that names it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be written ({error})") from None
