"""The engine protocol and the checks every engine makes on the way in."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, Protocol

from canvasmar_rt.bundle import Bundle
from canvasmar_rt.config import SamplingConfig
from canvasmar_rt.engines.memory import Buffer, Memory, Run
from canvasmar_rt.engines.program import Program
from canvasmar_rt.errors import EngineError, InputError


class Engine(Protocol):
    """A backend holding a bundle's components, shareable between threads.

    A rollout runs a `program`; `bind` runs one component by itself, on buffers of a `memory` of
    this engine, which is what parity checks need."""

    name: str
    device: str
    bundle: Bundle

    @property
    def graph_off(self) -> Mapping[str, str]:
        """What runs on a GPU without a CUDA graph, and why; empty on the CPU."""

    @property
    def omitted(self) -> Mapping[str, str]:
        """Components that `bind` does not take because rollouts here do without, and why."""

    def program(self, *, batch: int, sampling: SamplingConfig) -> Program: ...

    def memory(self) -> Memory: ...

    def bind(
        self,
        component: str,
        inputs: Mapping[str, Buffer],
        outputs: Mapping[str, Buffer],
        memory: Memory,
    ) -> Run: ...


ENGINES = ("onnxruntime", "torch", "tensorrt")
MAX_THREADS = 1024
"""More are a slip: engines would start every one of them, at megabytes each."""


def create(
    name: str, bundle: Bundle, *, device: str, threads: int | None = None, **options: Any
) -> Engine:
    """The engine called `name` on `device` ("cpu", "cuda" or "cuda:<index>"); there is no falling
    back to another. `options` are the engine's own.

    Raises:
        EngineError: unknown engine or option, missing package, or a device this machine or engine
            lacks.
    """
    if threads is not None:
        given, threads = threads, operator.index(threads) if hasattr(threads, "__index__") else 0
        if not 1 <= threads <= MAX_THREADS:
            raise EngineError(f"threads must lie in 1..{MAX_THREADS}, got {given!r}")
    if device != "cpu":
        cuda_index(name, device)
    bundle.manifest.require_device(device)
    kind: Any
    if name == "onnxruntime":
        from canvasmar_rt.engines.onnxruntime_engine import OnnxRuntimeEngine

        kind = OnnxRuntimeEngine
    elif name == "torch":
        try:
            import torch  # noqa: F401
        except ImportError:
            raise EngineError(
                "engine 'torch' needs PyTorch: pip install \"canvasmar-rt[export]\""
            ) from None
        from canvasmar_rt.engines.torch_engine import TorchEngine

        kind = TorchEngine
    elif name == "tensorrt":
        from canvasmar_rt.engines.tensorrt_engine import TensorRTEngine

        kind = TensorRTEngine
    else:
        raise EngineError(f"no engine {name!r}; engines are {', '.join(ENGINES)}")
    known: Mapping[str, type] = kind.OPTIONS
    if unknown := sorted(set(options) - set(known)):
        raise EngineError(
            f"engine {name!r} has no option {', '.join(unknown)}; its options are "
            f"{', '.join(known) or 'none'}"
        )
    for option, value in options.items():
        if known[option] is bool and not isinstance(value, bool):
            raise EngineError(f"engine {name!r}: {option} must be true or false, got {value!r}")
    made: Engine = kind(bundle, device=device, threads=threads, **options)
    return made


def cuda_index(engine: str, device: str) -> int:
    """The index of "cuda" (0) or "cuda:<index>".

    Raises:
        EngineError: for any other name.
    """
    kind, colon, index = device.partition(":") if isinstance(device, str) else ("", "", "")
    if kind != "cuda" or (colon and not index.isdecimal()):
        raise EngineError(
            f"engine {engine!r} knows no device {device!r}; devices are cpu, cuda and cuda:<index>"
        )
    return int(index or 0)


def check_buffers(
    bundle: Bundle, component: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
) -> None:
    """Check names, dtypes and dimensions against the manifest.

    Raises:
        EngineError: if the model has no such component.
        InputError: naming component and tensor, what was expected and what came.
    """
    entry = bundle.manifest.components.get(component)
    if entry is None:
        raise EngineError(
            f"{bundle.path}: model {bundle.manifest.model.name} has no component {component!r}"
        )
    symbols: dict[str, int] = {}
    for kind, given, wanted in (
        ("input", inputs, entry.inputs),
        ("output", outputs, entry.outputs),
    ):
        names = {t.name for t in wanted}
        if set(given) != names:
            raise InputError(
                f"{component}: {kind}s missing {sorted(names - set(given))}, unknown "
                f"{sorted(set(given) - names)}"
            )
        for tensor in wanted:
            buffer = given[tensor.name]
            where = f"{component}: {kind} {tensor.name}"
            if buffer.dtype != tensor.dtype:
                raise InputError(f"{where}: expected dtype {tensor.dtype}, got {buffer.dtype}")
            fits = len(buffer.shape) == len(tensor.dims) and all(
                size == (symbols.setdefault(dim, size) if isinstance(dim, str) else dim)
                for dim, size in zip(tensor.dims, buffer.shape, strict=True)
            )
            if not fits:
                raise InputError(
                    f"{where}: expected shape {tensor.dims} with {symbols}, got {buffer.shape}"
                )
    if "B" in symbols:
        bundle.manifest.batch.require(symbols["B"], f"{component}: ")
