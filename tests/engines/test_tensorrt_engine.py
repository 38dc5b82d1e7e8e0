"""How the TensorRT engine checks and binds, with stand-ins for TensorRT and CUDA: what is asked of
them and in which order, not what they answer."""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from canvasmar_rt.bundle import BatchRange, Bundle
from canvasmar_rt.engines import create, cuda_memory
from canvasmar_rt.engines.memory import Buffer, capturing
from canvasmar_rt.engines.tensorrt_build import profiles
from canvasmar_rt.engines.tensorrt_cache import (
    SCHEMA_VERSION,
    EngineMetadata,
    EngineSource,
    files_of,
    metadata_path,
    plan_path,
    write_engine,
)
from canvasmar_rt.engines.tensorrt_engine import TensorRTEngine
from canvasmar_rt.errors import EngineError
from canvasmar_rt.schedule import flow_plan
from tests.engines.fake_cuda import FakeCuda

LIBRARY = "canvasmar_rt.engines.tensorrt_library"
BUNDLE = Bundle.open("toytable")
SCRATCH = 1000


class Context:
    """Remembers what it is told; running it twice in a row is what a rollout does."""

    def __init__(self, component: str) -> None:
        self.component = component
        entry = BUNDLE.manifest.components[component]
        self.tensors = {t.name: t.dims for t in (*entry.inputs, *entry.outputs)}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch = (0, 0)
        self.streams: list[int] = []
        self.refuses = False

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        return index == 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def infer_shapes(self) -> list[str]:
        return []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        known = {
            symbol: size
            for told, shape in self.shapes.items()
            for symbol, size in zip(self.tensors[told], shape, strict=True)
        }
        return tuple(known[d] if isinstance(d, str) else d for d in self.tensors[name])

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        return SCRATCH

    def set_device_memory(self, address: int, size: int) -> None:
        self.scratch = (address, size)

    def execute_async_v3(self, stream: int) -> bool:
        self.streams.append(stream)
        return not self.refuses


class Library:
    """In place of `tensorrt_library`."""

    def __init__(self) -> None:
        self.contexts: list[Context] = []
        self.read: list[str] = []
        self.wrong: dict[str, str] = {}
        self.log = SimpleNamespace(taken=lambda: "a reason")
        self.trt = SimpleNamespace(
            __version__="11.4.0.106",
            Runtime=lambda log: "runtime",
            TensorLocation=SimpleNamespace(DEVICE="device"),
            ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"),
        )

    def started(self, kind: Any) -> Any:
        return kind(self.log)

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def deserialized(self, runtime: str, plan: bytes, what: str) -> Any:
        component = plan.decode()
        self.read.append(component)

        def context(strategy: str) -> Context:
            self.contexts.append(Context(component))
            return self.contexts[-1]

        return SimpleNamespace(
            create_execution_context=context,
            get_tensor_location=lambda name: "device",
            device_memory_size_v2=5 * SCRATCH,
            component=component,
        )

    def io_dtypes(self, engine: Any) -> dict[str, str]:
        entry = BUNDLE.manifest.components[engine.component]
        return {t.name: t.dtype for t in (*entry.inputs, *entry.outputs)} | self.wrong


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    fake = Library()
    monkeypatch.setitem(sys.modules, LIBRARY, fake)  # type: ignore[arg-type]
    cuda = FakeCuda()
    monkeypatch.setattr(cuda_memory, "_runtime", lambda: cuda)
    return fake


def write(directory: Path, component: str, **changes: object) -> None:
    graph, weights = files_of(BUNDLE, component)
    shapes = profiles(BUNDLE, component, BatchRange(minimum=1, optimum=1, maximum=4))
    assert shapes is not None
    source = EngineSource(
        component=component,
        tensorrt="11.4.0.106",
        gpu="Pretended GPU",
        compute_capability="9.0",
        bundle=BUNDLE.fingerprint,
        onnx_sha256=graph,
        weights_sha256=weights,
        profiles=shapes,
        optimization_level=5,
        workspace_bytes=None,
    )
    plan = component.encode()
    metadata = EngineMetadata(
        schema_version=SCHEMA_VERSION,
        source=dataclasses.replace(source, **changes),  # type: ignore[arg-type]
        io_dtypes={},
        layer_dtypes={},
        plan_sha256=hashlib.sha256(plan).hexdigest(),
        plan_bytes=len(plan),
        built_at="2026-01-01T00:00:00+00:00",
    )
    write_engine(directory, plan, metadata)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Engines of everything but the whole frame, which the frame loop does without."""
    for component in BUNDLE.manifest.components:
        if component != "frame":
            write(tmp_path, component)
    return tmp_path


def bound(engine: TensorRTEngine, component: str, batch: int = 2) -> tuple[Any, Any, Any]:
    entry = BUNDLE.manifest.components[component]
    evaluations = len(flow_plan(BUNDLE.manifest.sampling).time)
    sizes = {"B": batch, "G": 3, "S": 5, "E": evaluations, "K": 19, "M": 45}
    memory = engine.memory()

    def buffers(tensors: Any) -> dict[str, Buffer]:
        layout = {
            t.name: ([sizes[d] if isinstance(d, str) else d for d in t.dims], t.dtype)
            for t in tensors
        }
        return dict(memory.group(layout).buffers)

    inputs, outputs = buffers(entry.inputs), buffers(entry.outputs)
    return engine.bind(component, inputs, outputs, memory), {**inputs, **outputs}, memory


def test_bound_once_and_run_on_the_stream(library: Library, directory: Path) -> None:
    engine = TensorRTEngine(BUNDLE, engine_dir=directory)
    run, buffers, memory = bound(engine, "flow")
    (context,) = library.contexts
    assert context.addresses == {name: b.address for name, b in buffers.items()}
    assert context.shapes["z_tokens"] == (3, 2, 5, 256)
    assert context.scratch[1] >= SCRATCH
    assert context.scratch[0] % 256 == 0
    run()
    run()
    assert context.streams == [memory.stream] * 2
    context.refuses = True
    with pytest.raises(EngineError, match="flow: TensorRT failed at running: a reason"):
        run()


def test_a_context_that_cannot_tell_its_scratch_gets_the_most(
    library: Library, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT returns 0 where the question failed, and might write beyond less than it needs."""
    monkeypatch.setattr(Context, "update_device_memory_size_for_shapes", lambda self: 0)
    _kept = bound(TensorRTEngine(BUNDLE, engine_dir=directory), "flow")
    assert library.contexts[0].scratch[1] >= 5 * SCRATCH


def test_engines_are_shared_contexts_are_not(library: Library, directory: Path) -> None:
    engine = TensorRTEngine(BUNDLE, engine_dir=directory)
    kept = [bound(engine, "flow"), bound(engine, "flow")]
    assert library.read == ["flow"]
    first, second = library.contexts
    assert first.scratch[0] != second.scratch[0]  # two rollouts may run at once
    memory = kept[0][2]
    names = [t.name for t in BUNDLE.manifest.components["flow"].inputs]
    inputs = {n: b for n, b in kept[0][1].items() if n in names}
    outputs = {n: b for n, b in kept[0][1].items() if n not in names}
    engine.bind("flow", inputs, outputs, memory)
    assert library.contexts[2].scratch == first.scratch  # one rollout runs in turn
    assert engine.graph_off == {}


def test_contexts_are_not_made_while_work_is_captured(library: Library, directory: Path) -> None:
    engine, done = TensorRTEngine(BUNDLE, engine_dir=directory), threading.Event()
    _, buffers, memory = bound(engine, "encoder")
    entry = BUNDLE.manifest.components["encoder"]
    inputs, outputs = ({t.name: buffers[t.name] for t in x} for x in (entry.inputs, entry.outputs))

    def bind() -> None:
        engine.bind("encoder", inputs, outputs, memory)
        done.set()

    thread = threading.Thread(target=bind, daemon=True)
    with capturing():
        thread.start()
        assert not done.wait(0.1)
        assert len(library.contexts) == 1
    assert done.wait(10)
    thread.join()


def test_a_program_can_be_made(library: Library, directory: Path) -> None:
    """Every binding of the frame loop, and frames in which no engine does anything."""
    engine = create("tensorrt", BUNDLE, device="cuda:0", engine_dir=directory)
    program = engine.program(batch=2, sampling=BUNDLE.manifest.sampling)
    program.warmup()
    assert set(library.read) == set(BUNDLE.manifest.components) - {"frame"}
    ran = {c.component for c in library.contexts if c.streams}
    assert ran == set(BUNDLE.manifest.components) - {"frame", "encoder"}
    assert len({c.scratch for c in library.contexts}) == 1


def test_what_was_not_built_and_is_not_needed_is_omitted(library: Library, directory: Path) -> None:
    engine = TensorRTEngine(BUNDLE, engine_dir=directory)
    assert engine.omitted == {"frame": "not built; no rollout runs it"}
    write(directory, "frame")
    assert engine.omitted == {}
    one_step = dataclasses.replace(BUNDLE.manifest.sampling, ar_steps=1)
    manifest = dataclasses.replace(BUNDLE.manifest, sampling=one_step, fast=None)
    engine.bundle = dataclasses.replace(BUNDLE, manifest=manifest)
    assert engine.omitted == {"spatial": "a frame has one AR step"}


def test_every_difference_of_every_engine_is_named_at_once(
    library: Library, directory: Path
) -> None:
    library.trt.__version__ = "10.16.1.11"
    write(directory, "flow", gpu="NVIDIA L4", compute_capability="8.9")
    metadata_path(directory, "canvas").unlink()
    with pytest.raises(EngineError) as raised:
        TensorRTEngine(BUNDLE, engine_dir=directory)
    message = str(raised.value)
    assert message.count("TensorRT: built for 11.4.0.106, here 10.16.1.11") == 1
    assert "[flow] GPU: built for NVIDIA L4, here Pretended GPU" in message
    assert "[flow] compute capability: built for 8.9, here 9.0" in message
    assert "[canvas] " in message
    assert "canvas.plan.metadata.json is missing" in message
    command = shlex.split(message.split("Run: ")[1])
    assert command[:2] == ["canvasmar-rt", "build"]
    assert command[-1] == str(directory)


def test_engines_of_another_bundle_are_refused(library: Library, directory: Path) -> None:
    write(directory, "flow", onnx_sha256="a" * 64)
    with pytest.raises(EngineError, match=r"\[flow\] graph: built for aaaaaaaaaaaa\.\.\."):
        TensorRTEngine(BUNDLE, engine_dir=directory)


def test_a_changed_plan_is_not_loaded(library: Library, directory: Path) -> None:
    engine = TensorRTEngine(BUNDLE, engine_dir=directory)
    plan_path(directory, "flow").write_bytes(b"WOLF")
    with pytest.raises(EngineError, match="does not match its sha256"):
        bound(engine, "flow")
    assert library.read == []


def test_an_engine_of_other_dtypes_is_refused(library: Library, directory: Path) -> None:
    engine = TensorRTEngine(BUNDLE, engine_dir=directory)
    library.wrong = {"select_index": "int32"}
    with pytest.raises(EngineError, match="select_index is int32, expected int64"):
        bound(engine, "flow")


def test_a_shape_it_was_not_built_for(library: Library, directory: Path) -> None:
    engine = TensorRTEngine(BUNDLE, engine_dir=directory)
    with pytest.raises(EngineError, match=r"latent is \(5, 64, 32\), the engine takes 1x64x32 to"):
        bound(engine, "temporal", batch=5)


def test_an_address_that_is_not_aligned(library: Library, directory: Path) -> None:
    engine = TensorRTEngine(BUNDLE, engine_dir=directory)
    _, buffers, memory = bound(engine, "encoder")
    entry = BUNDLE.manifest.components["encoder"]
    buffers["latent"] = dataclasses.replace(
        buffers["latent"], address=buffers["latent"].address + 16
    )
    inputs, outputs = ({t.name: buffers[t.name] for t in x} for x in (entry.inputs, entry.outputs))
    with pytest.raises(EngineError, match="latent: its address is not a multiple of 256"):
        engine.bind("encoder", inputs, outputs, memory)


@pytest.mark.parametrize(
    "call", ["set_optimization_profile_async", "set_input_shape", "infer_shapes"]
)
def test_what_the_bindings_raise_is_an_engine_error(
    library: Library, directory: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(Context, call, refuse)
    engine = TensorRTEngine(BUNDLE, engine_dir=directory)
    with pytest.raises(EngineError, match="temporal: TensorRT failed at the shapes: a reason"):
        bound(engine, "temporal")


def test_switched_off_graphs_are_reported(library: Library, directory: Path) -> None:
    engine = TensorRTEngine(BUNDLE, engine_dir=directory, cuda_graph=False)
    memory = engine.memory()
    assert memory.device == "cuda:0"
    assert engine.graph_off == {"rollout 0": "switched off"}


def test_what_cannot_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="runs on cuda"):
        TensorRTEngine(BUNDLE, device="cpu", engine_dir=tmp_path)
    with pytest.raises(EngineError, match="threads"):
        TensorRTEngine(BUNDLE, engine_dir=tmp_path, threads=2)
    with pytest.raises(EngineError, match="needs engine_dir, the folder made by: canvasmar-rt"):
        TensorRTEngine(BUNDLE)


def test_without_tensorrt_the_command_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.delitem(sys.modules, LIBRARY, raising=False)
    with pytest.raises(EngineError, match=r'pip install "canvasmar-rt\[tensorrt\]"'):
        TensorRTEngine(BUNDLE, engine_dir=tmp_path)
