"""Stands for `cuda.bindings.runtime` where there is no GPU: "device" memory is host memory, work is
done when it is enqueued, or kept while a stream is being captured. It shows what CudaMemory asks of
CUDA, not what CUDA does with it."""

from __future__ import annotations

import ctypes
import enum
import itertools
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


class cudaError_t(enum.Enum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorNoDevice = 100
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900


OK = cudaError_t.cudaSuccess


class FakeCuda:
    """`calls` counts functions, `failing` maps functions to the error they return from now on,
    `live` holds what was made and not yet released."""

    cudaError_t = cudaError_t
    cudaMemcpyKind = SimpleNamespace(
        cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3
    )
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self, devices: int = 1) -> None:
        self.devices = devices
        self.calls: Counter[str] = Counter()
        self.failing: dict[str, cudaError_t] = {}
        self.live: dict[int, Any] = {}
        self.copies: list[tuple[int, int, int]] = []
        self.capturing: list[Callable[[], object]] | None = None
        self.unread_error = False
        self._handles = itertools.count(1)

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        work = getattr(type(self), name.replace("cuda", "do", 1), None)
        if work is None:
            raise AttributeError(name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls[name] += 1
            if name in self.failing:
                self.unread_error = True
                if name == "cudaStreamEndCapture":
                    self.capturing = None
                return self.failing[name], None
            result = work(self, *arguments)
            return (OK,) if result is None else (OK, result)

        return call

    def do(self, work: Callable[[], object]) -> None:
        if self.capturing is None:
            work()
        else:
            self.capturing.append(work)

    def doGetDeviceCount(self) -> int:
        return self.devices

    def doGetDeviceProperties(self, index: int) -> Any:
        return SimpleNamespace(name=b"Pretended GPU\0\0", major=9, minor=0)

    def doSetDevice(self, index: int) -> None:
        assert index < self.devices

    def doGetLastError(self) -> None:
        self.unread_error = False

    def doGetErrorString(self, error: cudaError_t) -> bytes:
        return b"what CUDA says of it"

    def doStreamCreateWithFlags(self, flags: int) -> int:
        assert flags == 1  # non-blocking
        return self.made(next(self._handles))

    def doStreamSynchronize(self, stream: int) -> None:
        assert self.capturing is None

    def made(self, handle: int, what: Any = None) -> int:
        self.live[handle] = what
        return handle

    def doMalloc(self, size: int) -> int:
        assert self.capturing is None
        room = ctypes.create_string_buffer(b"\xaa" * (size + 256))  # not zeroed, as on a GPU
        return self.made(-(-ctypes.addressof(room) // 256) * 256, room)

    def doHostAlloc(self, size: int, flags: int) -> int:
        return self.doMalloc(size)

    def released(self, handle: int) -> None:
        del self.live[handle]

    doFree = doFreeHost = doStreamDestroy = doGraphDestroy = doGraphExecDestroy = released

    def doMemsetAsync(self, address: int, value: int, size: int, stream: int) -> None:
        self.do(lambda: ctypes.memset(address, value, size))

    def doMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> None:
        self.copies.append((size, kind, stream))
        self.do(lambda: ctypes.memmove(target, source, size))

    def doMemcpy2DAsync(
        self, target: int, pitch: int, source: int, source_pitch: int,
        width: int, height: int, kind: int, stream: int,
    ) -> None:  # fmt: skip
        assert width <= min(pitch, source_pitch)

        def work() -> None:
            for row in range(height):
                ctypes.memmove(target + row * pitch, source + row * source_pitch, width)

        self.copies.append((width * height, kind, stream))
        self.do(work)

    def doStreamBeginCapture(self, stream: int, mode: int) -> None:
        assert self.capturing is None
        self.capturing = []

    def doStreamEndCapture(self, stream: int) -> int:
        work, self.capturing = self.capturing, None
        return self.made(next(self._handles), work)

    def doGraphInstantiate(self, graph: int, flags: int) -> int:
        return self.made(next(self._handles), self.live[graph])

    def doGraphLaunch(self, graph: int, stream: int) -> None:
        for work in self.live[graph]:
            work()
