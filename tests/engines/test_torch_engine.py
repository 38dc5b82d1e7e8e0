"""What the torch engine asks of PyTorch's libraries."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

import canvasmar_rt
from canvasmar_rt.bundle import Bundle
from canvasmar_rt.engines import torch_engine, torch_program
from canvasmar_rt.engines.program import Clock
from canvasmar_rt.engines.torch_engine import TorchEngine, compiled_graphs
from canvasmar_rt.engines.torch_program import ExactFloat32, TorchProgram
from canvasmar_rt.errors import EngineError
from canvasmar_rt.models.canvasmar import FrameModel
from canvasmar_rt.models.families import build
from canvasmar_rt.models.graphs import Graph, graph
from canvasmar_rt.verify import verify
from tests.conftest import FAMILIES, SAMPLING, small_config


@pytest.mark.parametrize("way", ["rollout", "verify"])
def test_convolutions_never_take_tf32(
    way: str, bundles: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the encoder and decoder would else differ from the certificate by 3e-4."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    allowed: list[tuple[str, bool]] = []
    component = TorchEngine.component

    def watched(self: TorchEngine, name: str) -> torch.nn.Module:
        module = component(self, name)
        module.register_forward_pre_hook(
            lambda *_: allowed.append((name, torch.backends.cudnn.allow_tf32))
        )
        return module

    monkeypatch.setattr(TorchEngine, "component", watched)
    bundle = bundles("expert")
    if way == "verify":
        verify(bundle.path, engine="torch")
    else:
        context = np.zeros((3, 16, 16, 3), np.uint8)
        canvasmar_rt.load(bundle.path, engine="torch").start(context).step()
    assert {name for name, _ in allowed} >= {"encoder", "decoder", "temporal"}
    assert not any(tf32 for _, tf32 in allowed)
    assert torch.backends.cudnn.allow_tf32


def test_threads_share_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    """One leaves while another is still inside, as two rollouts overlap."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    exact = ExactFloat32()
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with exact:
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(10)
    with exact:
        leave.set()
        thread.join()
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32


def test_the_newer_flags_are_put_back_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch refuses the older ones to whoever took these."""
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = conv.fp32_precision, matmul.fp32_precision
    try:
        conv.fp32_precision = "ieee"
        matmul.fp32_precision = "tf32"
        with ExactFloat32():
            assert conv.fp32_precision == "ieee"
            assert matmul.fp32_precision != "tf32"
        assert (conv.fp32_precision, matmul.fp32_precision) == ("ieee", "tf32")
    finally:
        conv.fp32_precision, matmul.fp32_precision = before


def test_programs_have_streams_of_their_own_as_long_as_there_are_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PyTorch hands out a few in turn, whoever still has them."""
    monkeypatch.setattr(torch_program, "_streams", weakref.WeakSet())
    monkeypatch.setattr(torch_program, "POOL", 4)

    class Stream:
        def __init__(self, handle: int) -> None:
            self.cuda_stream = handle

    turn = itertools.cycle(range(4))

    def make() -> Stream:
        return Stream(next(turn))

    kept = [torch_program.own_stream(make) for _ in range(3)]
    for _ in range(6):  # of programs that come and go
        assert torch_program.own_stream(make).cuda_stream == 3
    kept.append(torch_program.own_stream(make))
    assert {s.cuda_stream for s in kept} == {0, 1, 2, 3}
    assert torch_program.own_stream(make).cuda_stream in range(4)  # there is none left


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, of its compiler
def test_every_set_size_is_compiled(bundles: Callable[[str], Bundle]) -> None:
    """Beyond its usual limit of eight PyTorch runs shapes eager, without a word."""
    TorchEngine(bundles("expert"), compile=True).component("canvas")
    assert torch._dynamo.config.recompile_limit >= torch_engine.RECOMPILES


FULL = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB of "
    "which 1.00 GiB is free. Including non-PyTorch memory, this process has 7.00 GiB in use."
)


@pytest.mark.parametrize("where", ["load", "start", "warmup", "step"])
def test_a_full_gpu_is_one_error(
    where: str,
    bundles: Callable[[str], Bundle],
    clip: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError(FULL)

    path = bundles("expert").path
    wanted = r"total capacity of 8\.00 GiB of which 1\.00 GiB is free; use a smaller batch"
    if where == "load":
        monkeypatch.setattr(torch.nn.Module, "to", full)
        with pytest.raises(EngineError, match=wanted):
            canvasmar_rt.load(path, engine="torch")
        return
    predictor = canvasmar_rt.load(path, engine="torch")
    if where == "start":
        monkeypatch.setattr(TorchProgram, "_allocate", full)
        with pytest.raises(EngineError, match=wanted):
            predictor.start(clip)
        return
    rollout = predictor.start(clip)
    monkeypatch.setattr(TorchProgram, "_back", full)
    with pytest.raises(EngineError, match=wanted):
        getattr(rollout, where)()


class ModelElsewhere:
    """A model that says it is on a GPU."""

    device = torch.device("cuda", 0)

    def __init__(self, model: FrameModel) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def test_a_frame_whose_components_are_there_waits_for_nothing(
    bundles: Callable[[str], Bundle], clip: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a stream is being captured, waiting for it is an error."""
    waited: list[object] = []
    stream = SimpleNamespace(synchronize=lambda: waited.append(stream))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    predictor = canvasmar_rt.load(bundles("expert").path, engine="torch")
    rollout, engine = predictor.start(clip), predictor.engine
    assert isinstance(engine, TorchEngine)
    rollout.step()
    engine.model = ModelElsewhere(engine.model)  # type: ignore[assignment]
    rollout.step()
    assert not waited
    del engine._graphs["decoder"]
    rollout.step()
    assert len(waited) == 1


def test_tables_and_the_flow_kernel_take_no_tf32(
    bundles: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed: list[bool] = []
    made = torch_engine.graph

    def watched(model: FrameModel, name: str) -> Graph:
        allowed.append(torch.backends.cuda.matmul.allow_tf32)
        return made(model, name)

    class Kernel:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def component(self, have: Mapping[str, torch.Tensor]) -> torch.Tensor:
            allowed.append(torch.backends.cuda.matmul.allow_tf32)
            return have["partial"]

    monkeypatch.setattr(torch_engine, "graph", watched)
    program = TorchEngine(bundles("expert")).program(batch=1, sampling=SAMPLING)
    program._flow_kernel = Kernel()  # type: ignore[assignment]
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        matmul.allow_tf32 = True
        program.warmup()
        assert matmul.allow_tf32
    finally:
        matmul.allow_tf32 = before
    assert len(allowed) > 4
    assert not any(allowed)


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounter]:
    """Counts what torch.compile makes, which then runs without a compiler; what it cannot make one
    program of is an error."""
    counter, compile_ = CompileCounter(), torch.compile
    how = {"backend": counter, "fullgraph": True}
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compile_(*a, **k, **how))
    torch._dynamo.reset()
    yield counter
    torch._dynamo.reset()


def drawn(model: FrameModel, component: Callable[[str], Graph]) -> list[np.ndarray]:
    """A frame given, one drawn after it."""
    program = TorchProgram(model, component, name="torch", batch=1, sampling=SAMPLING, graphs=False)
    rng = np.random.default_rng(0)
    for noise in (program.noise.flow, program.noise.frame, program.noise.order):
        noise[:] = rng.standard_normal(noise.shape)
    ae = model.config.autoencoder
    size = (1, ae.temporal_compression, ae.height, ae.width, 3)
    program.advance(0, None)
    program.encode(rng.integers(0, 256, size, np.uint8))
    program.decode()
    frame = program.predict(
        1, None, order=None, level=lambda: 0, on_canvas=None, clock=Clock(), meanwhile=lambda: None
    )
    return [frame.latent.copy(), frame.frames.copy()]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, of its compiler
@pytest.mark.parametrize("name", ["expert", "mmdit", "unified", "next-group-isolated"])
def test_every_component_is_one_program(name: str, programs: CompileCounter) -> None:
    """What its compiler cannot trace PyTorch would run in pieces, without a word."""
    model = build(FAMILIES[name], seed=0)
    plain = drawn(model, lambda name: graph(model, name))
    assert programs.frame_count == 0
    for got, want in zip(
        drawn(model, compiled_graphs(model, captured=False).__getitem__), plain, strict=True
    ):
        np.testing.assert_array_equal(got, want)
    assert programs.frame_count > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_warming_up_compiles_what_a_look_at_the_canvas_runs(programs: CompileCounter) -> None:
    """Of a group, whose frames lie apart in memory."""
    model = build(FAMILIES["next-group"], seed=0)
    program = TorchProgram(
        model, compiled_graphs(model, captured=False).__getitem__, name="torch", batch=1,
        sampling=SAMPLING, graphs=False,
    )  # fmt: skip
    program.warmup()
    there = programs.frame_count
    seen: list[np.ndarray] = []
    for time in (1, 4):
        program.predict(
            time, None, order=None, level=lambda: 0, on_canvas=seen.append, clock=Clock(),
            meanwhile=lambda: None,
        )  # fmt: skip
    assert len(seen) == 2
    assert programs.frame_count == there


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_a_captured_component_repeats_is_compiled_once_a_shape(
    programs: CompileCounter,
) -> None:
    model = build(small_config(spatial_layers=7, encoder_layers=3), seed=0)
    plain = drawn(model, lambda name: graph(model, name))
    for got, want in zip(
        drawn(model, compiled_graphs(model, captured=True).__getitem__), plain, strict=True
    ):
        np.testing.assert_array_equal(got, want)
    whole = ("encoder", "temporal", "canvas", "unconditional", "decoder")
    # of a set: layers of known tokens, of all, the last one, what precedes evaluations, and those
    assert programs.frame_count == len(whole) + SAMPLING.ar_steps * 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch has no GPU")
@pytest.mark.parametrize("flow_kernel", [False, True])
def test_compiled_and_captured_frames_are_those_of_the_cpu(
    flow_kernel: bool, bundles: Callable[[str], Bundle], clip: np.ndarray
) -> None:
    path = bundles("expert").path
    fast = canvasmar_rt.load(
        path, engine="torch", device="cuda", compile=True, flow_kernel=flow_kernel
    )
    got, want = (p.start(clip, seed=4) for p in (fast, canvasmar_rt.load(path, engine="torch")))
    for _ in range(3):
        np.testing.assert_allclose(got.step().latent, want.step().latent, rtol=0, atol=1e-4)


def test_a_forked_process_is_refused_instead_of_waiting_for_good(
    bundles: Callable[[str], Bundle],
) -> None:
    """A frame there would wait for threads that only the parent has."""
    code = f"""
import os, canvasmar_rt
predictor = canvasmar_rt.load({str(bundles("expert").path)!r}, engine="torch")
rollout = predictor.start()
rollout.step()
if os.fork():
    os.wait()
else:
    for frame in rollout.step, lambda: predictor.start().step():
        try:
            frame()
        except canvasmar_rt.CanvasMarError as error:
            print("refused:", error, flush=True)
    os._exit(0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.count("refused: the torch engine was loaded before") == 2
    assert "spawn" in done.stdout
