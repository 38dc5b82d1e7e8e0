"""Overrides of configurations by name, for the training commands."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeVar

from canvasmar_rt.config import from_dict, to_dict
from canvasmar_rt.errors import ConfigError

T = TypeVar("T")


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
