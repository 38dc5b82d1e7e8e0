"""A GPU's memory and queue through cuda-python: groups that travel at once, captured graphs.

Everything is freed when the last object that needs it is gone. Importing this module needs neither
cuda-python nor a GPU.
"""

from __future__ import annotations

import dataclasses
import importlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from canvasmar_rt.engines.memory import (
    STORAGE,
    UNDISTURBED,
    Array,
    Buffer,
    Index,
    Layout,
    Run,
    capturing,
)
from canvasmar_rt.errors import EngineError

ALIGNMENT = 256
"""Of every buffer of a group, in bytes: what TensorRT asks of an address."""

SWITCHED_OFF = "switched off"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """Name and compute capability ("9.0") of a GPU."""

    name: str
    compute_capability: str


def gpu(index: int = 0) -> Gpu:
    """What GPU there is.

    Raises:
        EngineError: no cuda-python, no driver, or no such GPU.
    """
    cuda = _runtime()
    _require_gpu(cuda, index)
    properties = _checked(cuda, "asking for the GPU", cuda.cudaGetDeviceProperties(index))
    return Gpu(
        name=bytes(properties.name).rstrip(b"\0").decode(errors="replace"),
        compute_capability=f"{properties.major}.{properties.minor}",
    )


def choose_gpu(index: int) -> None:
    """Make a GPU the calling thread's.

    Raises:
        EngineError: as `gpu`.
    """
    cuda = _runtime()
    _require_gpu(cuda, index)
    _checked(cuda, "choosing the GPU", cuda.cudaSetDevice(index))


class CudaMemory:
    """See `canvasmar_rt.engines.memory.Memory`. One non-blocking stream; not for two threads,
    unless it is `shared`: then they take turns, also with whatever holds `UNDISTURBED`.

    device_index, device: 0 and "cuda:0".
    stream: handle of the stream everything is enqueued on.
    graph_off: why runs are launched one by one instead of as a captured graph; None where nothing
        stood in the way.

    Raises:
        EngineError: no cuda-python, no driver, or no such GPU.
    """

    def __init__(
        self, device_index: int = 0, *, capture: bool = True, shared: bool = False
    ) -> None:
        self._cuda = _runtime()
        _require_gpu(self._cuda, device_index)
        self.device_index, self.device = device_index, f"cuda:{device_index}"
        self.graph_off: str | None = None if capture else SWITCHED_OFF
        self._capture = capture
        self._turn: AbstractContextManager[Any] = UNDISTURBED if shared else nullcontext()
        self.activate()
        stream = self._do("creating a stream", "StreamCreateWithFlags", 1)  # non-blocking
        self.stream = int(stream)
        self._stream = _Owned(stream, self._cuda.cudaStreamDestroy)

    def activate(self) -> None:
        """Make this GPU the calling thread's; what launches kernels does so first."""
        self._do("choosing the GPU", "SetDevice", self.device_index)

    def group(self, layout: Layout, *, mirrored: bool = True) -> CudaGroup:
        self.activate()
        places, size = {}, 0
        for name, (shape, dtype) in layout.items():
            buffer = Buffer(size, tuple(shape), dtype, None, None)
            places[name] = buffer
            size += -(-buffer.nbytes // ALIGNMENT) * ALIGNMENT
        size = max(size, ALIGNMENT)
        device = _Owned(self._allocated("Malloc", size), self._cuda.cudaFree)
        self._do("clearing memory", "MemsetAsync", device.handle, 0, size, self.stream)
        host = mirror = None
        if mirrored:
            host = _Pinned(self._allocated("HostAlloc", size, 0), size, self._cuda.cudaFreeHost)
            mirror = np.asarray(host)  # keeps the block alive, as do all views of it
            mirror[:] = 0
        return CudaGroup(
            buffers={
                name: dataclasses.replace(
                    place,
                    address=device.handle + place.address,
                    host=None if mirror is None else _view(mirror, place),
                    owner=device,
                )
                for name, place in places.items()
            },
            _memory=self, _device=device, _host=host, _size=size,
        )  # fmt: skip

    def read(self, buffer: Buffer) -> Array:
        values = np.empty(buffer.shape, STORAGE[buffer.dtype])
        self._transfer("DeviceToHost", values.ctypes.data, buffer.address, buffer.nbytes)
        self.synchronize()
        return values

    def write(self, buffer: Buffer, values: Array, where: Index = ()) -> None:
        staged = self.read(buffer) if where else np.empty(buffer.shape, STORAGE[buffer.dtype])
        staged[where] = values
        self.synchronize()
        if buffer.host is not None:
            buffer.host[...] = staged
        self._transfer("HostToDevice", buffer.address, staged.ctypes.data, buffer.nbytes)
        self.synchronize()

    def spread(self, source: Buffer, target: Buffer) -> Run:
        rows, size = source.shape[0], source.nbytes // source.shape[0]
        pitch = target.nbytes // rows
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice

        def run() -> None:
            for at in range(target.address, target.address + pitch, size):
                self._do(
                    "copying", "Memcpy2DAsync",
                    at, pitch, source.address, size, size, rows, kind, self.stream,
                )  # fmt: skip

        return run

    def sequence(self, runs: Sequence[Run]) -> Run:
        """The first call does the work run by run, since what libraries set up lazily cannot be
        captured, and then captures it; later calls launch the graph. Runs that cannot be captured
        are launched one by one for ever, and `graph_off` says why."""
        kept = tuple(runs)  # with them what their addresses belong to

        def each() -> None:
            self.activate()
            for run in kept:
                run()

        if not self._capture:
            return each
        graph: _Owned | None = None
        tried = False

        def launch() -> None:
            nonlocal graph, tried
            if graph is not None:
                self.activate()
                self._do("launching a graph", "GraphLaunch", graph.handle, self.stream)
                return
            each()
            if not tried:
                self.synchronize()
                with capturing():
                    graph = self._captured(each)
                tried = True

        return launch

    def synchronize(self) -> None:
        self._do("waiting for the GPU", "StreamSynchronize", self.stream)

    def _captured(self, work: Run) -> _Owned | None:
        """The graph of what `work` enqueues, or None and the reason in `graph_off`."""
        try:
            graph = self._recorded(work)
            what = "making a graph executable"
            return _Owned(
                self._do(what, "GraphInstantiate", graph.handle, 0), self._cuda.cudaGraphExecDestroy
            )
        except EngineError as error:
            self.graph_off = f"the work could not be captured as a CUDA graph: {error}"
            return None

    def _recorded(self, work: Run) -> _Owned:
        # other threads go on allocating while this one captures
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._do("beginning a capture", "StreamBeginCapture", self.stream, mode)
        try:
            work()
        except BaseException:  # an interrupt, too, must not leave the stream capturing
            _, graph = self._cuda.cudaStreamEndCapture(self.stream)
            if graph is not None:
                self._cuda.cudaGraphDestroy(graph)
            self._cuda.cudaGetLastError()
            raise
        graph = self._do("ending a capture", "StreamEndCapture", self.stream)
        return _Owned(graph, self._cuda.cudaGraphDestroy)

    def _transfer(self, kind: str, target: int, source: int, size: int) -> None:
        kind = getattr(self._cuda.cudaMemcpyKind, f"cudaMemcpy{kind}")
        self._do("copying", "MemcpyAsync", target, source, size, kind, self.stream)

    def _allocated(self, function: str, size: int, *more: int) -> int:
        with UNDISTURBED:
            result = getattr(self._cuda, f"cuda{function}")(size, *more)
        if result[0] == self._cuda.cudaError_t.cudaErrorMemoryAllocation:
            self._cuda.cudaGetLastError()
            where = self.device if function == "Malloc" else "the host, in pinned memory"
            raise EngineError(
                f"out of memory on {where}: {size / 1e6:.1f} MB asked; use a smaller batch, or "
                "end what else holds memory"
            )
        return int(_checked(self._cuda, "allocating memory", result))

    def _do(self, what: str, function: str, *arguments: Any) -> Any:
        with self._turn:
            return _checked(self._cuda, what, getattr(self._cuda, f"cuda{function}")(*arguments))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CudaGroup:
    """See `canvasmar_rt.engines.memory.Group`: one block on the device, and one of the same layout
    in pinned host memory if it is mirrored."""

    buffers: Mapping[str, Buffer]
    _memory: CudaMemory
    _device: _Owned
    _host: _Pinned | None
    _size: int

    def upload(self) -> None:
        assert self._host is not None, "this group has no mirror"
        self._memory._transfer("HostToDevice", self._device.handle, self._host.handle, self._size)

    def download(self) -> None:
        assert self._host is not None, "this group has no mirror"
        self._memory._transfer("DeviceToHost", self._host.handle, self._device.handle, self._size)


class _Owned:
    """A handle that is released once nothing refers to it, or with the process."""

    def __init__(self, handle: Any, release: Callable[[Any], object]) -> None:
        self.handle = handle
        weakref.finalize(self, _undisturbed, release, handle).atexit = False


def _undisturbed(release: Callable[[Any], object], handle: Any) -> None:
    with UNDISTURBED:
        release(handle)


class _Pinned(_Owned):
    """Pinned host memory that NumPy can look at."""

    def __init__(self, address: int, size: int, release: Callable[[Any], object]) -> None:
        super().__init__(address, release)
        self.__array_interface__ = {
            "data": (address, False), "shape": (size,), "typestr": "|u1", "version": 3,
        }  # fmt: skip


def _view(mirror: Array, place: Buffer) -> Array:
    part = mirror[place.address : place.address + place.nbytes]
    return part.view(STORAGE[place.dtype]).reshape(place.shape)


def _runtime() -> Any:
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise EngineError(
            f"the GPU is reached through cuda-python, which cannot be imported ({error}): "
            'pip install "cuda-python>=13"'
        ) from None


def _require_gpu(cuda: Any, index: int) -> None:
    error, count = cuda.cudaGetDeviceCount()
    if error != cuda.cudaError_t.cudaSuccess or not count:
        reason = error.name if error != cuda.cudaError_t.cudaSuccess else "the driver lists none"
        raise EngineError(
            f"no NVIDIA GPU can be used ({reason}); see what nvidia-smi says, and update the driver"
        )
    if not 0 <= index < count:
        raise EngineError(f"no GPU cuda:{index}: this machine has {count}, counted from cuda:0")


def _checked(cuda: Any, what: str, result: tuple[Any, ...]) -> Any:
    error, *values = result
    if error != cuda.cudaError_t.cudaSuccess:
        cuda.cudaGetLastError()  # reading it clears what can be cleared
        text = bytes(cuda.cudaGetErrorString(error)[1]).decode(errors="replace")
        raise EngineError(
            f"CUDA failed at {what}: {error.name}: {text}; start the program anew if it stays"
        )
    return values[0] if values else None
