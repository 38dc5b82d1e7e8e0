"""PyTorch running a bundle's weights: eager, compiled, or captured in CUDA graphs."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING
from typing import cast as typed

import torch
from safetensors import SafetensorError
from torch import Tensor

from canvasmar_rt.bundle import Bundle
from canvasmar_rt.components import components
from canvasmar_rt.config import SamplingConfig
from canvasmar_rt.engines.base import check_buffers, cuda_index
from canvasmar_rt.engines.memory import Buffer, HostMemory, Memory, Run
from canvasmar_rt.engines.torch_program import (
    TorchProgram,
    exact_float32,
    memory_told,
    require_process,
)
from canvasmar_rt.errors import BundleError, EngineError
from canvasmar_rt.models.canvasmar import FrameModel, SpatialBlock
from canvasmar_rt.models.checkpoint import load_state
from canvasmar_rt.models.families import cast
from canvasmar_rt.models.graphs import FlowEvaluation, FlowPrepare, Graph, graph

if TYPE_CHECKING:
    from canvasmar_rt.engines.flow_kernel import Mode

TRANSPOSED = "^T"
"""Suffix of a weight stored transposed, as its graph reads it."""

PART = "^"
"""Between the name of a weight stored in parts and the number of one."""

SCALE = "^scale"
"""Suffix of the scales of a weight stored in int8, one for each of its output channels."""


def load_model(bundle: Bundle) -> FrameModel:
    """The PyTorch model of a bundle, in float32; int8 weights are multiplied by their scales.

    Raises:
        BundleError: if a weight is missing or misshapen.
    """
    from safetensors.torch import load_file

    state: dict[str, torch.Tensor] = {}
    for name in bundle.manifest.files:
        if name.endswith("/model.safetensors"):
            try:
                tensors = load_file(bundle.path / name)
            except (SafetensorError, OSError) as error:
                raise BundleError(
                    f"{bundle.path}: {name} cannot be read ({error}); export or copy it again"
                ) from None
            scales = {k: tensors.pop(k) for k in list(tensors) if k.endswith(SCALE)}
            for key, tensor in tensors.items():
                plain = key.removesuffix(TRANSPOSED)
                value = tensor
                if key.endswith(TRANSPOSED):  # a convolution's is (3, 3, C, N)
                    value = tensor.permute(3, 2, 0, 1) if tensor.ndim == 4 else tensor.T
                scale = scales.get(plain + SCALE)
                if scale is not None:
                    if scale.shape != value.shape[:1]:
                        raise BundleError(
                            f"{bundle.path}: tensor {plain}{SCALE} has shape "
                            f"{tuple(scale.shape)}, expected {tuple(value.shape[:1])}; export or "
                            "copy it again"
                        )
                    value = value * scale.view(-1, *[1] * (value.ndim - 1))
                state[plain] = value.contiguous()
    for first in [name for name in state if name.endswith(f"{PART}0")]:
        name = first.removesuffix(f"{PART}0")
        parts: list[Tensor] = []
        while (part := f"{name}{PART}{len(parts)}") in state:
            parts.append(state.pop(part))
        try:
            state[name] = torch.cat(parts)
        except RuntimeError as error:
            raise BundleError(
                f"{bundle.path}: the parts of {name} do not fit ({error}); export it again"
            ) from None
    return load_state(bundle.manifest.model, state, str(bundle.path))


def torch_device(device: str) -> torch.device:
    """PyTorch's name of "cpu", "cuda" or "cuda:<index>".

    Raises:
        EngineError: if this PyTorch has no such device.
    """
    if device == "cpu":
        return torch.device("cpu")
    index = cuda_index("torch", device)
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        raise EngineError(
            f"this PyTorch ({torch.__version__}) has no {device}, only "
            f"{torch.cuda.device_count()} CUDA devices; docs/install.md says how to get the CUDA "
            "build, 'canvasmar-rt doctor' what is missing"
        )
    return torch.device("cuda", index)


def compiled(module: torch.nn.Module) -> None:
    """Run a module through torch.compile, each of its shapes: set sizes are many, and beyond its
    usual limits PyTorch would run the others eager."""
    import torch._dynamo.config as dynamo

    for name in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(dynamo, name, max(getattr(dynamo, name), RECOMPILES))
    module.compile(dynamic=False)


REPEATED = (SpatialBlock, FlowPrepare, FlowEvaluation)
"""What a component calls again and again."""


def compiled_graphs(model: FrameModel, *, captured: bool) -> dict[str, Graph]:
    """All components through torch.compile.

    Those that will be `captured` pay for their calls once: there the layers and evaluations that
    they repeat are compiled by themselves, one program for all that are alike, in a fraction of
    the time. The layers are the model's, for whoever runs it; tables are made of them before."""
    graphs = {name: graph(model, name) for name in components(model.config) if name != "frame"}
    for module in graphs.values():
        repeated = [x for x in module.modules() if captured and isinstance(x, REPEATED)]
        parts: Sequence[torch.nn.Module] = repeated or [module]
        for part in parts:
            compiled(part)
    return graphs


RECOMPILES = 1024


class TorchEngine:
    """The bundle's dtype on the CPU or CUDA. `cuda_graph` captures a frame into one graph on CUDA;
    `compile` runs the components through torch.compile, which builds kernels at the first frame.
    `flow_kernel` draws tokens with the Triton kernel of `canvasmar_rt.engines.flow_kernel` in place
    of the flow component, as launches or, with `flow_persistent`, in one; the attribute
    `flow_kernel` says what runs. `bind` always runs the components."""

    name = "torch"
    OPTIONS = MappingProxyType(
        {"compile": bool, "cuda_graph": bool, "flow_kernel": bool, "flow_persistent": bool}
    )

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str = "cpu",
        threads: int | None = None,
        compile: bool = False,
        cuda_graph: bool = True,
        flow_kernel: bool = False,
        flow_persistent: bool = False,
    ) -> None:
        place = torch_device(device)
        if threads is not None:
            torch.set_num_threads(threads)
        self.flow_kernel: Mode | None = None
        if flow_kernel:
            _require_flow_kernel(bundle, place)
            self.flow_kernel = "persistent" if flow_persistent else "staged"
        elif flow_persistent:
            raise EngineError("flow_persistent is a way of the flow kernel: set flow_kernel too")
        self.bundle, self.device = bundle, str(place)
        model = load_model(bundle)
        if bundle.manifest.dtype != "float32":
            model = cast(model, getattr(torch, bundle.manifest.dtype))
        with memory_told():
            self.model = model.to(place)
        self._threads, self._compile, self._cuda_graph = threads, compile, cuda_graph
        self._graphs: dict[str, Graph] = {}
        self._lock = threading.Lock()
        self._process = os.getpid()

    def like(self, bundle: Bundle) -> TorchEngine:
        """Another bundle on an engine with this one's device and options."""
        return TorchEngine(
            bundle,
            device=self.device,
            threads=self._threads,
            compile=self._compile,
            cuda_graph=self._cuda_graph,
            flow_kernel=self.flow_kernel is not None,
            flow_persistent=self.flow_kernel == "persistent",
        )

    @property
    def graph_off(self) -> Mapping[str, str]:
        if self.device == "cpu" or self._cuda_graph:
            return {}
        return {"frame": "switched off"}

    @property
    def omitted(self) -> Mapping[str, str]:
        whole = "frame" in self.bundle.manifest.components
        return {"frame": "composed of the others, which run"} if whole else {}

    @memory_told()
    def program(self, *, batch: int, sampling: SamplingConfig) -> TorchProgram:
        require_process(self._process)
        return TorchProgram(
            self.model,
            self.component,
            name=self.name,
            batch=batch,
            sampling=sampling,
            graphs=self._cuda_graph,
            flow_kernel=self.flow_kernel,
        )

    def component(self, name: str) -> Graph:
        """The module of a component, shared by all rollouts."""
        with self._lock:
            if name not in self._graphs:
                self._make(name)
            return self._graphs[name]

    def _make(self, name: str) -> None:
        on_gpu = self.model.device.type == "cuda"
        with exact_float32:  # tables are products
            if self._compile and not self._graphs:
                captured = self._cuda_graph and on_gpu
                self._graphs |= compiled_graphs(self.model, captured=captured)
            else:
                self._graphs[name] = graph(self.model, name)
        if on_gpu:  # tables are for all streams
            torch.cuda.current_stream(self.model.device).synchronize()

    def memory(self) -> Memory:
        return HostMemory()

    def bind(
        self,
        component: str,
        inputs: Mapping[str, Buffer],
        outputs: Mapping[str, Buffer],
        memory: Memory,
    ) -> Run:
        """One component on host buffers, through copies on a GPU: for parity checks."""
        check_buffers(self.bundle, component, inputs, outputs)
        module = self.component(component)
        args = [_tensor(inputs[s.name]) for s in module.component.inputs]
        out = [_tensor(outputs[s.name]) for s in module.component.outputs]

        def run() -> None:
            with torch.inference_mode(), exact_float32:
                made = module(*(x.to(self.device) for x in args))
                for target, value in zip(out, typed("tuple[Tensor, ...]", made), strict=True):
                    target.copy_(value)

        return run


def _require_flow_kernel(bundle: Bundle, place: torch.device) -> None:
    """
    Raises:
        EngineError: if the flow kernel cannot run here, saying why.
    """
    try:
        from canvasmar_rt.engines.flow_kernel import supported
    except ModuleNotFoundError as error:
        raise EngineError(f"flow_kernel: {error}; pip install triton") from None
    if reason := supported(bundle.manifest.model, place):
        raise EngineError(f"flow_kernel: {reason}")


def _tensor(buffer: Buffer) -> Tensor:
    assert buffer.host is not None
    tensor = torch.from_numpy(buffer.host)
    return tensor.view(torch.bfloat16) if buffer.dtype == "bfloat16" else tensor
