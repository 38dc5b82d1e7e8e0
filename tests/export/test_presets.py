"""A preset near full size, exported, certified and run, and the sizes of all of them. What ships of
`toytable` has a certificate of its own, over more frames."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import canvasmar_rt
from canvasmar_rt.bundle import Bundle
from canvasmar_rt.config import ModelConfig, SamplingConfig, preset
from canvasmar_rt.export.exporter import ExportOptions, export_bundle
from canvasmar_rt.models.families import build, count_parameters


def shallow_bair() -> tuple[ModelConfig, SamplingConfig]:
    """`bair` with the fewest layers, and 2 flow steps instead of 30: the flow head is its full
    size, so that 32 frames on two engines would otherwise take ten minutes on two cores."""
    model, sampling = preset("bair")
    layers = {"temporal_layers": 1, "canvas_layers": 1, "spatial_layers": 2, "encoder_layers": 1}
    return dataclasses.replace(model, name="shallow-bair", **layers), dataclasses.replace(
        sampling, flow_steps=2
    )


FRAMES = 4


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    config, sampling = shallow_bair()
    path = tmp_path_factory.mktemp("presets") / config.name
    return export_bundle(
        build(config), sampling, path, ExportOptions(drift_frames=FRAMES), source="test"
    )


def test_frames_equal_pytorch(bundle: Bundle) -> None:
    """Same seed: the same token order at every step, latents within 1e-3 relative."""
    parity = bundle.manifest.parity
    assert parity is not None
    assert len(parity.drift) == FRAMES
    assert max(parity.drift) < 1e-3
    assert parity.flipped_orders == 0
    assert all(d.relative < 1e-4 for d in parity.components.values())


def test_it_continues_a_clip(bundle: Bundle) -> None:
    predictor = canvasmar_rt.load(bundle.path)
    rng = np.random.default_rng(0)
    rollout = predictor.start(rng.integers(0, 256, (5, 64, 64, 3), dtype=np.uint8))
    frames = rollout.step().frames
    assert frames.shape == (1, 2, 64, 64, 3)
    assert frames.std() > 0


@pytest.mark.parametrize(
    ("name", "without_autoencoder"),
    [("bair", 173.4e6), ("ucf101", 538.7e6), ("kinetics600", 737.6e6), ("toytable", 6.305e6)],
)
def test_parameter_counts(name: str, without_autoencoder: float) -> None:
    """Counts of the layers of Table 3; kinetics600 is within 1% of the paper's 733M."""
    counts = count_parameters(preset(name)[0])
    total = sum(v for k, v in counts.items() if k != "autoencoder")
    assert total == pytest.approx(without_autoencoder, rel=2e-3)
