"""Overrides of configurations by name, for the training commands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import typer

from canvasmar_rt.config import from_dict, parsed, to_dict
from canvasmar_rt.errors import ConfigError

T = TypeVar("T")
SetData = Annotated[
    list[str] | None,
    typer.Option("--set-data", help="Override an option of the reader, e.g. action_dim=7."),
]


def override(config: T, assignments: Sequence[str] | None) -> T:
    """A configuration with `a.b=value` assignments applied."""
    values = to_dict(config)
    for path, value in parsed(assignments or ()):
        *parents, name = path.split(".")
        place: Any = values
        for parent in parents:
            place = place.get(parent) if isinstance(place, dict) else None
        if not isinstance(place, dict) or name not in place:
            known = ", ".join(sorted(place)) if isinstance(place, dict) else ", ".join(values)
            raise ConfigError(f"no option {path!r}; there are {known}")
        place[name] = value
    return from_dict(type(config), values)
