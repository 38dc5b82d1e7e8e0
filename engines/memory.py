"""The memory a rollout's arrays live in: the host's own, or a GPU's with mirrors on the host.

A rollout asks for arrays in groups that travel together, so that a frame costs one transfer in and
one out however many tensors it has. On the CPU a group's arrays are the memory the engine reads and
nothing is ever copied.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Index = tuple[slice | int, ...]
"""Of a part of an array; () is all of it."""
Run = Callable[[], None]
"""One piece of work on bound buffers; on a GPU it is only enqueued, `Memory.synchronize` waits."""

STORAGE: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),  # NumPy has none: the bits
    "int64": np.dtype(np.int64),
    "uint8": np.dtype(np.uint8),
}
"""How the host holds values of a dtype."""


UNDISTURBED = threading.RLock()
"""Held while work is captured as a CUDA graph, and by what must not happen meanwhile on any thread:
another capture, or allocating and freeing device memory."""

_LOADING = threading.RLock()


@contextmanager
def loading() -> Iterator[None]:
    """Load a model on a GPU inside, which allocates all along: not while work is captured, since
    ONNX Runtime captures in CUDA's global mode, in which any thread's allocation fails and ends the
    capture. What was captured before runs on meanwhile."""
    with _LOADING:
        yield


@contextmanager
def capturing() -> Iterator[None]:
    """Capture a CUDA graph inside: alone in the process, and with no garbage collected, since what
    is freed during a capture ends it."""
    with _LOADING, UNDISTURBED:  # always in this order
        was_on = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if was_on:
                gc.enable()


def to_storage(values: Array, dtype: str) -> Array:
    """Numbers as the host holds them in `dtype`; to bfloat16 they are rounded to nearest even."""
    if dtype != "bfloat16":
        return np.asarray(values, STORAGE[dtype])
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16).reshape(np.shape(values))


def from_storage(stored: Array, dtype: str) -> Array:
    """The numbers `stored` holds: float32 for bfloat16, else as they are."""
    if dtype != "bfloat16":
        return stored
    return (stored.astype(np.uint32) << 16).view(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Buffer:
    """A C-contiguous array at a fixed address that an engine's runs read or write.

    address: where the engine finds it, in bytes.
    shape, dtype: as in the bundle's tensor table ("float32", "float16", "bfloat16", ...).
    host: its values on the host, `STORAGE[dtype]`: on the CPU the array itself, on a GPU the mirror
        its group keeps, or None where it keeps none.
    owner: what must live as long as the address is used.
    """

    address: int
    shape: tuple[int, ...]
    dtype: str
    host: Array | None
    owner: object

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * STORAGE[self.dtype].itemsize

    def view(self, *shape: int) -> Buffer:
        """The same memory under another shape of as many values."""
        assert math.prod(shape) == math.prod(self.shape), (self.shape, shape)
        host = None if self.host is None else self.host.reshape(shape)
        return dataclasses.replace(self, shape=shape, host=host)

    def head(self, count: int) -> Buffer:
        """The first `count` of the first axis, in the same memory."""
        if not 1 <= count <= self.shape[0]:
            raise IndexError(f"the first {count} of {self.shape[0]}")
        host = None if self.host is None else self.host[:count]
        return dataclasses.replace(self, shape=(count, *self.shape[1:]), host=host)

    def row(self, index: int) -> Buffer:
        """The part at `index` of the first axis, in the same memory."""
        if not 0 <= index < self.shape[0]:
            raise IndexError(f"row {index} of {self.shape[0]}")
        return dataclasses.replace(
            self,
            address=self.address + index * self.nbytes // self.shape[0],
            shape=self.shape[1:],
            host=None if self.host is None else self.host[index],
        )


Layout = Mapping[str, tuple[Sequence[int], str]]
"""Shape and dtype by name."""


class Group(Protocol):
    """Buffers that travel together."""

    @property
    def buffers(self) -> Mapping[str, Buffer]: ...

    def upload(self) -> None:
        """Enqueue one transfer of all mirrors to the device; nothing to do on the CPU."""

    def download(self) -> None:
        """Enqueue one transfer of all buffers to their mirrors; nothing to do on the CPU."""


class Memory(Protocol):
    """The memory and the queue of one rollout on a device."""

    device: str

    def group(self, layout: Layout, *, mirrored: bool = True) -> Group:
        """Zeroed buffers at addresses that stay. Without a mirror `host` is None on a GPU; such a
        group cannot travel.

        Raises:
            EngineError: if the device has not enough memory.
        """

    def read(self, buffer: Buffer) -> Array:
        """A copy of the values, once everything enqueued before is done (for snapshots)."""

    def write(self, buffer: Buffer, values: Array, where: Index = ()) -> None:
        """Overwrite the values, or those at `where`, `STORAGE` dtype and their shape (for
        snapshots)."""

    def spread(self, source: Buffer, target: Buffer) -> Run:
        """A run that copies (B, ...) to (B, ...), or to all (B, J, ...) of a group."""

    def sequence(self, runs: Sequence[Run]) -> Run:
        """One run that does all of `runs` in order; on a GPU a captured graph where possible."""

    def synchronize(self) -> None:
        """Wait until everything enqueued is done."""


@dataclasses.dataclass(frozen=True)
class HostGroup:
    buffers: Mapping[str, Buffer]

    def upload(self) -> None:
        """The arrays are the memory."""

    def download(self) -> None:
        """The arrays are the memory."""


class HostMemory:
    """Plain NumPy arrays."""

    device = "cpu"

    def group(self, layout: Layout, *, mirrored: bool = True) -> HostGroup:
        buffers = {}
        for name, (shape, dtype) in layout.items():
            array = np.zeros(tuple(shape), STORAGE[dtype])
            buffers[name] = Buffer(array.ctypes.data, array.shape, dtype, array, array)
        return HostGroup(buffers)

    def read(self, buffer: Buffer) -> Array:
        assert buffer.host is not None
        return buffer.host.copy()

    def write(self, buffer: Buffer, values: Array, where: Index = ()) -> None:
        assert buffer.host is not None
        buffer.host[where] = values

    def spread(self, source: Buffer, target: Buffer) -> Run:
        assert source.host is not None
        assert target.host is not None
        values, to = source.host, target.host
        if to.ndim > values.ndim:
            values = values[:, None]

        def run() -> None:
            np.copyto(to, values)

        return run

    def sequence(self, runs: Sequence[Run]) -> Run:
        def run() -> None:
            for each in runs:
                each()

        return run

    def synchronize(self) -> None:
        """Runs on the CPU return when they are done."""
