"""What the torch engine asks of PyTorch's libraries."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

import canvasmar_rt
from canvasmar_rt.bundle import Bundle
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
