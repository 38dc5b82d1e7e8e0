"""What command lines share: errors of one line, interrupts, and the bar on stderr."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import types

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from canvasmar_rt.errors import CanvasMarError

INTERRUPTED = 130

stderr = Console(stderr=True, emoji=False)


def run_command(app: typer.Typer) -> None:
    """Run a command line; a user's mistake is one line on stderr and exit status 2."""
    signal.signal(signal.SIGTERM, _terminate)  # so that temporary files are removed
    hangup = getattr(signal, "SIGHUP", None)  # when a terminal goes; nohup has it ignored
    if hangup is not None and signal.getsignal(hangup) is signal.SIG_DFL:
        signal.signal(hangup, _terminate)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed before we began, as a daemon's may be
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a path must never fail to print
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # while an error can still be told
    except CanvasMarError as error:
        print_error(error)
        sys.exit(2)
    except KeyboardInterrupt:  # before the command itself began, which turns it into SystemExit
        stderr.print("interrupted")
        sys.exit(INTERRUPTED)
    except OSError as error:
        _discard_stdout()
        if isinstance(error, BrokenPipeError):  # as typer leaves when the reader went away
            sys.exit(1)
        then = "see that what is written to has space"
        try:
            os.getcwd()
        except FileNotFoundError:
            then = "the current directory is gone: cd to another"
        print_error(CanvasMarError(f"cannot go on ({error}); {then}"))
        sys.exit(2)
    except SystemExit as leaving:
        if leaving.code == INTERRUPTED:
            stderr.print("interrupted")
        raise


def _discard_stdout() -> None:
    """What stdout could not take is not tried again at exit."""
    with contextlib.suppress(OSError), open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), sys.stdout.fileno())


def _terminate(signum: int, frame: types.FrameType | None) -> None:
    raise KeyboardInterrupt


def print_error(error: CanvasMarError) -> None:
    """The error as one line on stderr."""
    stderr.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)


def stderr_bar(quiet: bool = False) -> Progress:
    """A bar on stderr, for work whose length is known."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TimeRemainingColumn(), console=stderr, transient=True,
        disable=quiet or not stderr.is_terminal,
    )  # fmt: skip
