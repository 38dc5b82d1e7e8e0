"""What the ONNX Runtime engine does on a GPU before anything runs, with stand-ins for CUDA and for
sessions."""

from __future__ import annotations

import gc
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import onnxruntime as ort
import pytest

from canvasmar_rt.bundle import Bundle
from canvasmar_rt.engines import cuda_memory, onnxruntime_engine
from canvasmar_rt.engines.memory import UNDISTURBED, capturing
from canvasmar_rt.engines.onnxruntime_engine import OnnxRuntimeEngine
from canvasmar_rt.errors import EngineError
from tests.engines.fake_cuda import FakeCuda

BUNDLE = Bundle.open("toytable")


class Inner:
    """In place of what an `onnxruntime.InferenceSession` holds; notes what of CUDA's was there when
    it ended."""

    ends: ClassVar[list[set[int]]] = []
    cuda: ClassVar[FakeCuda]

    def __del__(self) -> None:
        self.ends.append(set(self.cuda.live))


class Session:
    """In place of `onnxruntime.InferenceSession`."""

    def __init__(self, path: str, options: ort.SessionOptions, **chosen: Any) -> None:
        self._sess = Inner()
        manifest = BUNDLE.manifest
        name = next(n for n in manifest.components if BUNDLE.file(n) == Path(path))
        fixed = manifest.fixed_dims(name)
        entry = manifest.components[name]
        self._inputs, self._outputs = (
            [
                SimpleNamespace(
                    name=t.name,
                    type=f"tensor({'float' if t.dtype == 'float32' else t.dtype})",
                    shape=[fixed.get(str(d), d) for d in t.dims],
                )
                for t in x
            ]
            for x in (entry.inputs, entry.outputs)
        )

    def io_binding(self) -> SimpleNamespace:
        return SimpleNamespace(
            session=self._sess, bind_input=lambda *_: None, bind_output=lambda *_: None
        )

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider"]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        return []

    def get_inputs(self) -> list[Any]:
        return self._inputs

    def get_outputs(self) -> list[Any]:
        return self._outputs


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    Inner.cuda = cuda = FakeCuda()
    monkeypatch.setattr(cuda_memory, "_runtime", lambda: cuda)
    monkeypatch.setattr(onnxruntime_engine, "preload", lambda: None)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", Session)


def test_sessions_are_not_made_while_work_is_captured() -> None:
    engine, made = OnnxRuntimeEngine(BUNDLE, device="cuda"), threading.Event()

    def load() -> None:
        engine.session("frame")
        made.set()

    thread = threading.Thread(target=load, daemon=True)
    with capturing():
        thread.start()
        assert not made.wait(0.1)
    assert made.wait(10)
    thread.join()


def made(component: str | None) -> tuple[int, int, Any]:
    """A stream, how many sessions are on it, and what keeps them: an engine, or a binding too."""
    engine = OnnxRuntimeEngine(BUNDLE, device="cuda")
    assert engine._cuda is not None
    handle, count = engine._cuda.stream, len(engine._sessions)
    if component is None:
        return handle, count, engine
    entry, memory = BUNDLE.manifest.components[component], engine.memory()
    inputs, outputs = (
        memory.group(
            {t.name: ([2 if isinstance(d, str) else d for d in t.dims], t.dtype) for t in tensors}
        ).buffers
        for tensors in (entry.inputs, entry.outputs)
    )
    return handle, count, engine.bind(component, inputs, outputs, memory)


@pytest.mark.parametrize("component", [None, "decoder"])
def test_the_stream_outlives_the_sessions(component: str | None) -> None:
    """At its end the TensorRT-RTX plugin frees memory on it."""
    Inner.ends.clear()
    stream, sessions, keeps = made(component)
    del keeps
    gc.collect()
    assert len(Inner.ends) == sessions
    assert all(stream in live for live in Inner.ends)
    assert not Inner.cuda.live


def test_the_plugin_wants_an_onnxruntime_that_names_nvidias_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plugin = SimpleNamespace(get_library_path=lambda: "plugin.so")
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", plugin)
    monkeypatch.setattr(ort, "__version__", "1.29.0")
    with pytest.raises(EngineError, match=r"1\.30 or newer, this is 1\.29\.0: pip install"):
        OnnxRuntimeEngine(BUNDLE, device="cuda", provider="tensorrt-rtx")


def test_captured_work_runs_while_sessions_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    making, go_on = threading.Event(), threading.Event()

    class Slow(Session):
        def __init__(self, *given: Any, **chosen: Any) -> None:
            making.set()
            assert go_on.wait(10)
            super().__init__(*given, **chosen)

    engine = OnnxRuntimeEngine(BUNDLE, device="cuda")
    monkeypatch.setattr(ort, "InferenceSession", Slow)
    thread = threading.Thread(target=lambda: engine.session("frame"))
    thread.start()
    assert making.wait(10)
    free = UNDISTURBED.acquire(timeout=5)
    go_on.set()
    thread.join()
    assert free
    UNDISTURBED.release()


def test_work_that_is_left_to_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes are counted on the CPU by every provider."""

    def part(provider: str, *operators: str) -> Any:
        nodes = [SimpleNamespace(op_type=o) for o in operators]
        return SimpleNamespace(ep_name=provider, get_nodes=lambda: nodes)

    there = [part("CUDAExecutionProvider", "MatMul"), part("CPUExecutionProvider", "Shape", "Mul")]
    monkeypatch.setattr(Session, "get_provider_graph_assignment_info", lambda _: there)
    OnnxRuntimeEngine(BUNDLE, device="cuda")
    there.append(part("CPUExecutionProvider", "Resize", "Conv"))
    with pytest.raises(EngineError, match=r"no kernels for Conv, Resize of .*\(float32\)"):
        OnnxRuntimeEngine(BUNDLE, device="cuda")


def test_onnxruntime_tells_where_nodes_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    options = ort.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = ort.InferenceSession(
        BUNDLE.file("decoder"), options, providers=["CPUExecutionProvider"]
    )
    assert {"Conv", "Resize"} <= set(onnxruntime_engine.left_to_the_cpu(session))
