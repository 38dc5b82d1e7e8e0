"""Masked-autoregressive video prediction, fast enough to sit inside a control loop."""

from importlib.metadata import PackageNotFoundError, version

from canvasmar_rt.config import ModelConfig, SamplingConfig, preset
from canvasmar_rt.errors import CanvasMarError
from canvasmar_rt.rollout import Prediction, Predictor, Rollout, RolloutState, load

try:
    __version__ = version("canvasmar-rt")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "CanvasMarError",
    "ModelConfig",
    "Prediction",
    "Predictor",
    "Rollout",
    "RolloutState",
    "SamplingConfig",
    "load",
    "preset",
]
