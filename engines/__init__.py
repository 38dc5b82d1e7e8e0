"""Backends behind one protocol; `canvasmar_rt.load` picks one by name and never another."""

from canvasmar_rt.engines.base import ENGINES, Engine, create

__all__ = ["ENGINES", "Engine", "create"]
