"""What the torch engine asks of PyTorch's libraries."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch

import canvasmar_rt
from canvasmar_rt.bundle import Bundle
from canvasmar_rt.engines import torch_engine, torch_program
from canvasmar_rt.engines.torch_engine import TorchEngine
from canvasmar_rt.engines.torch_program import ExactFloat32
from canvasmar_rt.verify import verify


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
