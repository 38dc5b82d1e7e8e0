"""The engine protocol and the checks every engine makes on the way in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from canvasmar_rt.bundle import Bundle
from canvasmar_rt.errors import EngineError, InputError

Array = npt.NDArray[Any]
Run = Callable[[], None]
"""Runs one bound component: reads its input arrays, fills its output arrays, returns when done."""


class Engine(Protocol):
    """A backend holding a bundle's components, shareable between threads.

    `bind` fixes the arrays of one call once; calling the returned function then allocates nothing
    that outlives the call."""

    name: str
    device: str
    bundle: Bundle

    def bind(
        self, component: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]
    ) -> Run: ...


ENGINES = ("onnxruntime", "torch")


def create(name: str, bundle: Bundle, *, device: str, threads: int | None) -> Engine:
    """The engine called `name` on `device`; there is no falling back to another.

    Raises:
        EngineError: unknown engine, missing package, or a device this machine or engine lacks.
    """
    if threads is not None and threads < 1:
        raise EngineError(f"threads must be >= 1, got {threads}")
    if name == "onnxruntime":
        from canvasmar_rt.engines.onnxruntime_engine import OnnxRuntimeEngine

        return OnnxRuntimeEngine(bundle, device=device, threads=threads)
    if name == "torch":
        try:
            import torch  # noqa: F401
        except ImportError:
            raise EngineError(
                "engine 'torch' needs PyTorch: pip install 'canvasmar-rt[export]'"
            ) from None
        from canvasmar_rt.engines.torch_engine import TorchEngine

        return TorchEngine(bundle, device=device, threads=threads)
    raise EngineError(f"no engine {name!r}; engines are {', '.join(ENGINES)}")


def check_arrays(
    bundle: Bundle, component: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]
) -> None:
    """Check names, dtypes, dimensions and memory layout against the manifest.

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
            array = given[tensor.name]
            where = f"{component}: {kind} {tensor.name}"
            if array.dtype != np.dtype(tensor.dtype):
                raise InputError(f"{where}: expected dtype {tensor.dtype}, got {array.dtype}")
            fits = array.ndim == len(tensor.dims) and all(
                size == (symbols.setdefault(dim, size) if isinstance(dim, str) else dim)
                for dim, size in zip(tensor.dims, array.shape, strict=True)
            )
            if not fits:
                raise InputError(
                    f"{where}: expected shape {tensor.dims} with {symbols}, got {array.shape}"
                )
            if not array.flags.c_contiguous:
                raise InputError(f"{where}: expected a C-contiguous array")
            if kind == "output" and not array.flags.writeable:
                raise InputError(f"{where}: expected a writeable array")
    if "B" in symbols:
        bundle.manifest.batch.require(symbols["B"], f"{component}: ")
