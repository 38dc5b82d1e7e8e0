"""What a certificate is measured with and held against, without PyTorch."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from canvasmar_rt import verify as module
from canvasmar_rt.bundle import Bundle, Difference, Parity
from canvasmar_rt.engines import create
from canvasmar_rt.errors import BundleError
from canvasmar_rt.rollout import Predictor
from canvasmar_rt.schedule import set_sizes
from canvasmar_rt.verify import compare_component, compare_rollout, failures, verify


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


@pytest.mark.parametrize(
    ("kind", "step", "counts"),
    [
        ("maskgit", 3, False),
        ("maskgit", 2, True),
        ("motion", 3, True),
        ("random", 3, True),
    ],
)
def test_places_in_a_set_that_no_noise_decides_do_not_count(
    kind: Any, step: int, counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MaskGiT's last step has only the staticness to order its tokens by, in which engines in half
    precision swap near ties: such exports were refused."""
    manifest = Bundle.open("toytable").manifest
    sampling = dataclasses.replace(manifest.sampling, order=kind, ar_steps=4)
    manifest = dataclasses.replace(manifest, sampling=sampling, fast=None)
    engine: Any = SimpleNamespace(bundle=SimpleNamespace(manifest=manifest))
    sizes = set_sizes(manifest.model.tokens, 4)
    order = np.random.default_rng(0).permutation(manifest.model.tokens)[None]
    other = order.copy()
    part = slice(sum(sizes[:step]), sum(sizes[: step + 1]))
    other[:, part] = order[:, part][:, ::-1]
    monkeypatch.setattr(module, "run_component", lambda *_: {"order": other})
    assert (compare_component(engine, "frame", {}, {"order": order}).relative > 0) == counts
    other[0, [0, -1]] = order[0, [-1, 0]]  # of two sets
    assert compare_component(engine, "frame", {}, {"order": order}).relative > 0
