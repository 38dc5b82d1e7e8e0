"""PyTorch running a bundle's weights: the reference behind the engine protocol."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch

from canvasmar_rt.bundle import Bundle
from canvasmar_rt.engines.base import Array, Run, check_arrays
from canvasmar_rt.errors import EngineError
from canvasmar_rt.models.canvasmar import CanvasMAR
from canvasmar_rt.models.checkpoint import load_state
from canvasmar_rt.models.graphs import Graph, graph

TRANSPOSED = "^T"
"""Suffix of a weight stored transposed, as its graph reads it."""


def load_model(bundle: Bundle) -> CanvasMAR:
    """The PyTorch model of a bundle, in float32.

    Raises:
        BundleError: if a weight is missing or misshapen.
    """
    from safetensors.torch import load_file

    state: dict[str, torch.Tensor] = {}
    for name in bundle.manifest.files:
        if name.endswith("/model.safetensors"):
            for key, tensor in load_file(bundle.path / name).items():
                if key.endswith(TRANSPOSED):
                    state[key.removesuffix(TRANSPOSED)] = tensor.T.contiguous()
                else:
                    state[key] = tensor
    return load_state(bundle.manifest.model, state, str(bundle.path))


class TorchEngine:
    """Eager PyTorch in float32 on the CPU."""

    name = "torch"

    def __init__(self, bundle: Bundle, *, device: str = "cpu", threads: int | None = None) -> None:
        if device != "cpu":
            raise EngineError(f"engine 'torch' runs on cpu; got device {device!r}")
        if bundle.manifest.dtype != "float32":
            raise EngineError(
                f"engine 'torch' runs float32 bundles; {bundle.path} is {bundle.manifest.dtype}"
            )
        if threads is not None:
            torch.set_num_threads(threads)
        self.bundle, self.device = bundle, device
        self.model = load_model(bundle)
        self._graphs: dict[str, Graph] = {}
        self._lock = threading.Lock()

    def bind(
        self, component: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]
    ) -> Run:
        check_arrays(self.bundle, component, inputs, outputs)
        with self._lock:
            if component not in self._graphs:
                self._graphs[component] = graph(self.model, component)
            module = self._graphs[component]
        args = [torch.from_numpy(inputs[s.name]) for s in module.component.inputs]
        out = [torch.from_numpy(outputs[s.name]) for s in module.component.outputs]

        def run() -> None:
            with torch.inference_mode():
                for target, value in zip(out, module(*args), strict=True):
                    target.copy_(value)

        return run
