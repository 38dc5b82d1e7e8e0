"""CudaMemory against a pretended CUDA, and the same once more where there is a GPU."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest

from canvasmar_rt.engines import cuda_memory
from canvasmar_rt.engines.cuda_memory import CudaMemory
from canvasmar_rt.engines.memory import (
    STORAGE,
    UNDISTURBED,
    HostMemory,
    Memory,
    capturing,
)
from canvasmar_rt.errors import EngineError
from tests.engines.fake_cuda import FakeCuda, cudaError_t

LAYOUT = {
    "scalar": ((), "float32"),
    "bits": ((3, 5), "bfloat16"),
    "indices": ((2, 65), "int64"),
    "pixels": ((2, 4, 4, 3), "uint8"),
}


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(cuda_memory, "_runtime", lambda: fake)
    return fake


def values(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: rng.integers(0, 200, shape).astype(STORAGE[dtype])
        for name, (shape, dtype) in LAYOUT.items()
    }


def round_trip(memory: CudaMemory) -> None:
    group = memory.group(LAYOUT)
    given = values(1)
    for name, buffer in group.buffers.items():
        assert buffer.host is not None
        assert not buffer.host.any()
        assert not memory.read(buffer).any()
        buffer.host[...] = given[name]
    group.upload()
    for name, buffer in group.buffers.items():
        np.testing.assert_array_equal(memory.read(buffer), given[name])
    other = memory.group(LAYOUT, mirrored=False)
    for name, buffer in other.buffers.items():
        memory.write(buffer, values(2)[name])
        to = group.buffers[name].address
        memory._transfer("DeviceToDevice", to, buffer.address, buffer.nbytes)
    group.download()
    memory.synchronize()
    for name, buffer in group.buffers.items():
        np.testing.assert_array_equal(buffer.host, values(2)[name])
        assert buffer.shape == LAYOUT[name][0]


def replayed(memory: CudaMemory) -> None:
    """A sequence reads what its buffers hold when it is called, every time."""
    group = memory.group({"x": ((4,), "float32")})
    out = memory.group({"x": ((4,), "float32")})
    x, y = group.buffers["x"], out.buffers["x"]
    run = memory.sequence([group.upload, memory.spread(x, y), out.download])
    for i in range(4):
        assert x.host is not None
        x.host[:] = i
        run()
        memory.synchronize()
        np.testing.assert_array_equal(y.host, np.full(4, i))


def spread_over_groups(memory: Memory) -> None:
    frames = memory.group({"one": ((2, 3), "float32"), "group": ((2, 4, 3), "float32")}).buffers
    memory.write(frames["one"], np.arange(6, dtype=np.float32).reshape(2, 3))
    memory.spread(frames["one"], frames["group"])()
    for j in range(4):
        np.testing.assert_array_equal(
            memory.read(frames["group"])[:, j], memory.read(frames["one"])
        )


def test_a_frame_is_spread_over_a_group(cuda: FakeCuda) -> None:
    spread_over_groups(CudaMemory())
    spread_over_groups(HostMemory())


def test_values_travel(cuda: FakeCuda) -> None:
    round_trip(CudaMemory())


def test_a_group_is_one_block_and_one_transfer(cuda: FakeCuda) -> None:
    memory = CudaMemory()
    group = memory.group(LAYOUT)
    assert (cuda.calls["cudaMalloc"], cuda.calls["cudaHostAlloc"]) == (1, 1)
    start = group.buffers["scalar"].address
    assert [b.address - start for b in group.buffers.values()] == [0, 256, 512, 512 + 5 * 256]
    assert all(b.address % 256 == 0 for b in group.buffers.values())
    cuda.copies.clear()
    group.upload()
    group.download()
    size = 512 + 5 * 256 + 256
    assert cuda.copies == [(size, 1, memory.stream), (size, 2, memory.stream)]


def test_without_a_mirror_there_is_no_host_memory(cuda: FakeCuda) -> None:
    group = CudaMemory().group(LAYOUT, mirrored=False)
    assert cuda.calls["cudaHostAlloc"] == 0
    assert all(b.host is None for b in group.buffers.values())
    bits = group.buffers["bits"]
    assert bits.row(1).address == bits.address + 10
    assert (bits.head(1).address, bits.head(1).shape) == (bits.address, (1, *bits.shape[1:]))
    for count in (0, bits.shape[0] + 1):
        with pytest.raises(IndexError, match=f"the first {count} of"):
            bits.head(count)


def test_a_group_may_be_empty(cuda: FakeCuda) -> None:
    group = CudaMemory().group({})
    group.upload()
    assert group.buffers == {}


def test_what_was_written_survives_an_upload(cuda: FakeCuda) -> None:
    memory = CudaMemory()
    group = memory.group({"x": ((2,), "float32")})
    memory.write(group.buffers["x"], np.array([1, 2], np.float32))
    group.upload()
    np.testing.assert_array_equal(memory.read(group.buffers["x"]), [1, 2])


def test_a_sequence_becomes_a_graph_after_its_first_call(cuda: FakeCuda) -> None:
    memory = CudaMemory()
    ran = []
    run = memory.sequence([lambda: ran.append(1), lambda: ran.append(2)])
    assert ran == []
    run()
    assert ran == [1, 2, 1, 2]  # once for its work, once to be captured
    run()
    run()
    assert ran == [1, 2, 1, 2]
    assert cuda.calls["cudaGraphLaunch"] == 2
    assert memory.graph_off is None
    replayed(memory)


def test_capturing_can_be_switched_off(cuda: FakeCuda) -> None:
    memory = CudaMemory(capture=False)
    replayed(memory)
    assert memory.graph_off == "switched off"
    assert cuda.calls["cudaStreamBeginCapture"] == 0


@pytest.mark.parametrize(
    "function", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate"]
)
def test_what_cannot_be_captured_runs_one_by_one(cuda: FakeCuda, function: str) -> None:
    cuda.failing[function] = cudaError_t.cudaErrorStreamCaptureUnsupported
    memory = CudaMemory()
    replayed(memory)
    assert memory.graph_off is not None
    assert "cudaErrorStreamCaptureUnsupported" in memory.graph_off
    assert cuda.calls["cudaStreamBeginCapture"] == 1
    assert not cuda.unread_error


@pytest.mark.parametrize("spoilt", [False, True], ids=["capture goes on", "capture is spoilt"])
def test_a_run_that_refuses_to_be_captured(cuda: FakeCuda, spoilt: bool) -> None:
    if spoilt:
        cuda.failing["cudaStreamEndCapture"] = cudaError_t.cudaErrorStreamCaptureUnsupported
    memory = CudaMemory()
    ran = []

    def refuses() -> None:
        if cuda.capturing is not None:
            raise EngineError("flow: TensorRT failed at running")
        ran.append(1)

    run = memory.sequence([refuses])
    run()
    run()
    assert ran == [1, 1]
    assert memory.graph_off is not None
    assert "flow: TensorRT failed at running" in memory.graph_off
    assert cuda.capturing is None
    assert not cuda.unread_error
    assert cuda.calls["cudaGraphDestroy"] == (0 if spoilt else 1)


def test_an_interrupt_ends_the_capture(cuda: FakeCuda) -> None:
    def interrupted() -> None:
        if cuda.capturing is not None:
            raise KeyboardInterrupt

    memory = CudaMemory()
    with pytest.raises(KeyboardInterrupt):
        memory.sequence([interrupted])()
    assert cuda.capturing is None


def test_everything_is_freed(cuda: FakeCuda) -> None:
    gc.disable()  # by reference counts alone
    try:
        memory = CudaMemory()
        replayed(memory)
        round_trip(memory)
        view = memory.group(LAYOUT).buffers["indices"].host
        del memory
        assert len(cuda.live) == 1  # what `view` looks at
        assert view is not None
        view[...] = 3
        del view
        assert not cuda.live
    finally:
        gc.enable()


def test_out_of_memory_says_how_much_was_asked(cuda: FakeCuda) -> None:
    memory = CudaMemory()
    layout = {"x": ((1000, 1000), "float32")}
    cuda.failing["cudaHostAlloc"] = cudaError_t.cudaErrorMemoryAllocation
    with pytest.raises(EngineError, match=r"out of memory on the host.*4\.0 MB asked"):
        memory.group(layout)
    cuda.failing["cudaMalloc"] = cudaError_t.cudaErrorMemoryAllocation
    with pytest.raises(EngineError, match=r"out of memory on cuda:0: 4\.0 MB asked"):
        memory.group(layout)
    assert not cuda.unread_error
    assert len(cuda.live) == 1  # the stream


def test_other_errors_are_named(cuda: FakeCuda) -> None:
    memory = CudaMemory()
    cuda.failing["cudaStreamSynchronize"] = cudaError_t.cudaErrorIllegalAddress
    with pytest.raises(EngineError, match=r"waiting.*cudaErrorIllegalAddress: what CUDA says"):
        memory.synchronize()


def test_no_gpu_no_driver_no_package(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="no GPU cuda:1: this machine has 1"):
        CudaMemory(1)
    cuda.failing["cudaGetDeviceCount"] = cudaError_t.cudaErrorNoDevice
    with pytest.raises(EngineError, match=r"no NVIDIA GPU can be used \(cudaErrorNoDevice\)"):
        CudaMemory()
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(EngineError, match='pip install "cuda-python'):
        CudaMemory()


def test_the_gpu_is_named(cuda: FakeCuda) -> None:
    found = cuda_memory.gpu()
    assert (found.name, found.compute_capability) == ("Pretended GPU", "9.0")


@pytest.mark.parametrize(
    ("shared", "work"),
    [
        (False, lambda m: m.group(LAYOUT)),
        (False, lambda m: m.sequence([lambda: None])()),
        (True, lambda m: m.synchronize()),
    ],
    ids=["allocation", "capture", "any call on a shared stream"],
)
def test_a_capture_is_left_alone(
    cuda: FakeCuda, shared: bool, work: Callable[[CudaMemory], object]
) -> None:
    memory, done = CudaMemory(shared=shared), threading.Event()

    def run() -> None:
        work(memory)
        done.set()

    thread = threading.Thread(target=run, daemon=True)
    with capturing():
        assert not gc.isenabled()
        thread.start()
        assert not done.wait(0.1)
    assert gc.isenabled()
    assert done.wait(10)
    thread.join()


def test_a_stream_of_ones_own_waits_for_no_capture(cuda: FakeCuda) -> None:
    memory, done = CudaMemory(), threading.Event()

    def run() -> None:
        memory.synchronize()
        done.set()

    with UNDISTURBED:
        thread = threading.Thread(target=run)
        thread.start()
        assert done.wait(10)
    thread.join()


@pytest.mark.gpu
@pytest.mark.parametrize("capture", [True, False])
def test_on_a_gpu(capture: bool) -> None:
    try:
        memory = CudaMemory(capture=capture)
    except EngineError as error:
        pytest.skip(str(error))
    round_trip(memory)
    replayed(memory)
    spread_over_groups(memory)
    assert memory.graph_off == (None if capture else "switched off")
