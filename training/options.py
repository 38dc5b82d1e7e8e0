"""What the training commands share: overrides by name, and errors of one line."""

from __future__ import annotations

import json
import signal
import sys
import types
from collections.abc import Sequence
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape

from canvasmar_rt.config import from_dict, to_dict
from canvasmar_rt.errors import CanvasMarError, ConfigError

T = TypeVar("T")


def run_command(app: typer.Typer) -> None:
    """Run a command line; a user's mistake is one line on stderr and exit status 2."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except CanvasMarError as error:
        console = Console(stderr=True, emoji=False)
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)


def _terminate(signum: int, frame: types.FrameType | None) -> None:
    raise KeyboardInterrupt


def override(config: T, assignments: Sequence[str] | None) -> T:
    """A configuration with `a.b=value` assignments applied; values are JSON, or bare strings."""
    values = to_dict(config)
    for assignment in assignments or ():
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"{assignment!r}: expected name=value")
        *parents, name = path.split(".")
        place: Any = values
        for parent in parents:
            place = place.get(parent) if isinstance(place, dict) else None
        if not isinstance(place, dict) or name not in place:
            known = ", ".join(sorted(place)) if isinstance(place, dict) else ", ".join(values)
            raise ConfigError(f"no option {path!r}; there are {known}")
        try:
            place[name] = json.loads(text)
        except ValueError:
            place[name] = text
    return from_dict(type(config), values)
