"""Every error this library raises on purpose.

A message names the component and tensor (or file) concerned, what was expected, what came,
and what to do about it. The command line prints the message alone and exits with status 2.
"""

import importlib.util


class CanvasMarError(Exception):
    """Base of all errors raised by canvasmar-rt."""


class ConfigError(CanvasMarError, ValueError):
    """A configuration or sampling option is out of range or contradicts another."""


class InputError(CanvasMarError, ValueError):
    """An array handed to the runtime has the wrong shape, dtype or range."""


class VideoError(InputError):
    """A video, image folder or NPZ archive cannot be read or written."""


class BundleError(CanvasMarError):
    """A bundle is missing, cut, tampered with, or of another schema version."""


class EngineError(CanvasMarError):
    """An engine or device was asked for that this machine or bundle cannot give."""


class NotFiniteError(EngineError):
    """An engine returned values that are not finite."""


class ParityError(CanvasMarError):
    """An engine's outputs are further from the reference than the stated tolerance."""


class StateError(CanvasMarError):
    """A rollout was asked for something its present state does not allow."""


def need(what: str, extra: str, *modules: str) -> None:
    """Raise `EngineError` if a module that `what` needs, and `extra` brings, is not installed."""
    missing = [module for module in modules if not _found(module)]
    if missing:
        lacking = ", ".join(missing)
        raise EngineError(f'{what} needs {lacking}: pip install "canvasmar-rt[{extra}]"')


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def need_torch(what: str) -> None:
    """Raise `EngineError` if PyTorch or its ONNX exporter is not installed."""
    need(what, "export", "torch", "onnx", "onnxscript")
