"""Masked-autoregressive video prediction, fast enough to sit inside a control loop."""

import os
from importlib.metadata import PackageNotFoundError, version

from canvasmar_rt.config import ModelConfig, SamplingConfig, preset
from canvasmar_rt.errors import CanvasMarError
from canvasmar_rt.rollout import Prediction, Predictor, Rollout, RolloutState, load

# ONNX Runtime reads it when it is first imported: unless told otherwise its builds of 1.32 keep a
# device id in the home directory and report to their maker from a thread of their own.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

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
