"""What a certificate is measured with and held against, without PyTorch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from canvasmar_rt.bundle import Bundle, Difference, Parity
from canvasmar_rt.engines import create
from canvasmar_rt.errors import BundleError
from canvasmar_rt.rollout import Predictor
from canvasmar_rt.verify import compare_rollout, failures, verify


def test_only_the_whole_frame_has_the_wider_tolerance() -> None:
    off = Difference(max_abs=1.0, relative=0.4, cosine=0.9)
    found = Parity(
        engine="onnxruntime", tolerance=0.2, frame_tolerance=0.5, drift_tolerance=1.0,
        components={"frame": off, "flow": off}, drift=(0.0,), flipped_orders=0,
    )  # fmt: skip
    assert failures(found) == ["flow differs by 4.00e-01 (tolerance 2e-01)"]


def test_a_bundle_without_a_certificate_is_not_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open("toytable-int8")
    bare = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, parity=None))
    monkeypatch.setattr(Bundle, "open", lambda *_, **__: bare)
    with pytest.raises(BundleError, match="no parity certificate; export the bundle again"):
        verify("toytable-int8")


def test_a_frame_in_another_order_is_counted_and_drawn_in_the_golden_one() -> None:
    """Then the frames after it are compared with what they should be."""
    engine = create("onnxruntime", Bundle.open("toytable-int8"), device="cpu")
    rollout = Predictor(engine).start(seed=6)
    latents, orders = [], []
    for frame in range(3):
        before = rollout.state()
        drawn = rollout.step()
        if frame == 1:
            rollout.restore(before)
            drawn = rollout._step(None, order=drawn.order[:, ::-1].copy())
        latents.append(drawn.latent[0].copy())
        orders.append(drawn.order[0].copy())
    golden = {"seed": np.array([6]), "latents": np.stack(latents), "orders": np.stack(orders)}
    drift, flipped = compare_rollout(engine, golden)
    assert flipped == 1
    assert max(drift) < 1e-5
    golden["latents"][2] *= 1.5
    drift, _ = compare_rollout(engine, golden)
    assert drift[2] == pytest.approx(1 / 3, rel=1e-4)
