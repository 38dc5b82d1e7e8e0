"""Overrides of configurations by name, for the training commands."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, TypeVar

import typer

from canvasmar_rt.config import from_dict, to_dict
from canvasmar_rt.errors import ConfigError

T = TypeVar("T")
SetData = Annotated[
    list[str] | None,
    typer.Option("--set-data", help="Override an option of the reader, e.g. action_dim=7."),
]


def parsed(assignments: Sequence[str] | None) -> Iterator[tuple[str, Any]]:
    """Names and values of `name=value` assignments; values are JSON, or bare strings.

    Raises:
        ConfigError: if one has no "=".
    """
    for assignment in assignments or ():
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"{assignment!r}: expected name=value")
        try:
            yield name, json.loads(text)
        except RecursionError:
            raise ConfigError(f"{name}: brackets within brackets without end") from None
        except ValueError:
            yield name, text


def override(config: T, assignments: Sequence[str] | None) -> T:
    """A configuration with `a.b=value` assignments applied."""
    values = to_dict(config)
    for path, value in parsed(assignments):
        *parents, name = path.split(".")
        place: Any = values
        for parent in parents:
            place = place.get(parent) if isinstance(place, dict) else None
        if not isinstance(place, dict) or name not in place:
            known = ", ".join(sorted(place)) if isinstance(place, dict) else ", ".join(values)
            raise ConfigError(f"no option {path!r}; there are {known}")
        place[name] = value
    return from_dict(type(config), values)
