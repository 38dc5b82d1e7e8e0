"""What a worker of the cluster loads and may use."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from canvasmar_rt.errors import ConfigError
from canvasmar_rt.rollout import Predictor, load


@dataclasses.dataclass(frozen=True, kw_only=True)
class Worker:
    """One process with one model.

    model: bundle directory, the same on every machine, or the name of a packaged bundle.
    profile: the bundle's sampling, as in `canvasmar_rt.load`.
    cpus, gpus: reserved for each worker. With `gpus` the model runs on the GPU that Ray gives it,
        and without on that many CPU threads (one for a part of a CPU).
    """

    model: str = "toytable-int8"
    engine: str = "onnxruntime"
    profile: str | None = None
    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if not (self.cpus >= 0 and self.gpus >= 0 and self.cpus + self.gpus > 0):
            raise ConfigError(f"a worker needs CPUs or GPUs, got {self.cpus:g} and {self.gpus:g}")
        if Path(self.model).is_dir():  # workers have working directories of their own
            object.__setattr__(self, "model", str(Path(self.model).resolve()))

    def load(self) -> Predictor:
        """The model, in this process; `CanvasMarError` where it cannot be had."""
        return load(
            self.model,
            engine=self.engine,
            device="cuda" if self.gpus else "cpu",
            threads=None if self.gpus else max(1, int(self.cpus)),
            profile=self.profile,
        )

    @property
    def resources(self) -> dict[str, Any]:
        """What Ray is asked for."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus}
