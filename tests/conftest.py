"""Small models and their bundles, exported once a session."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout

from canvasmar_rt.bundle import Bundle
from canvasmar_rt.config import AutoencoderConfig, FlowConfig, ModelConfig, SamplingConfig


def small_config(name: str = "small", **changes: object) -> ModelConfig:
    """16x16 pixels, 4x4 latents, two pixel frames a step, a window of three latent frames."""
    config = ModelConfig(
        name=name,
        autoencoder=AutoencoderConfig(
            height=16, width=16, temporal_compression=2, latent_channels=4, widths=(8, 16), blocks=1
        ),
        flow=FlowConfig(width=32, blocks=2),
        dim=32,
        heads=2,
        temporal_layers=2,
        canvas_layers=1,
        spatial_layers=3,
        encoder_layers=1,
        context_frames=3,
        action_dim=4,
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def unified_config(name: str = "unified", **changes: object) -> ModelConfig:
    """`small_config` as a unified masked autoregressive model."""
    absent = {"canvas_layers": 0, "spatial_layers": 0, "encoder_layers": 0}
    only = {"family": "unified", "canvas": False, "temporal_patch": 1, "norm": "shared"}
    return small_config(name, **(only | absent | changes))


def least_config(name: str = "least", **changes: object) -> ModelConfig:
    """8x8 pixels and one layer of everything, for what looks at files more than at frames."""
    config = ModelConfig(
        name=name,
        autoencoder=AutoencoderConfig(
            height=8, width=8, temporal_compression=1, latent_channels=2, widths=(8,), blocks=1
        ),
        flow=FlowConfig(width=16, blocks=1),
        dim=16,
        heads=2,
        temporal_layers=1,
        canvas_layers=1,
        spatial_layers=2,
        encoder_layers=1,
        context_frames=2,
        action_dim=2,
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


SAMPLING = SamplingConfig(ar_steps=3, flow_steps=4)

VARIANTS = {
    "expert": small_config("expert"),
    "mmdit": small_config(
        "mmdit",
        norm="mmdit",
        condition_attention="isolated",
        flow=FlowConfig(width=32, blocks=2, modulation="additive"),
        action_dim=0,
        residual=True,
        canvas_conv=24,
        autoencoder=dataclasses.replace(small_config().autoencoder, encoder_kernel=1),
    ),
    "no-canvas": small_config("no-canvas", norm="shared", canvas=False),
}
"""Between them every option of CanvasMAR: norms, condition attention, modulation, actions, canvas,
what is drawn, an encoder without history."""

FAMILIES = VARIANTS | {
    "unified": unified_config(residual=True),
    "next-group": small_config(
        "next-group", group=3, spatial_layers=6, action_dim=6, residual=True
    ),
    "next-group-isolated": small_config(
        "next-group-isolated",
        group=2,
        spatial_layers=6,
        encoder_layers=3,
        condition_attention="isolated",
        canvas=False,
        action_dim=0,
    ),
}
"""And models of every other family."""


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The models here are too small to share between threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """Bundle of a variant by name, exported on first use."""
    from canvasmar_rt.export.exporter import ExportOptions, export_bundle
    from canvasmar_rt.models.families import build

    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # all workers share the bundles
    root = root / "bundles"
    root.mkdir(exist_ok=True)

    def opened(name: str) -> Bundle:
        if (root / name).exists():
            return Bundle.open(root / name)
        model = build(FAMILIES[name], seed=3)
        return export_bundle(model, SAMPLING, root / name, ExportOptions(seed=5), source="test")

    def get(name: str) -> Bundle:
        try:
            with FileLock(root / f"{name}.lock", timeout=0):
                return opened(name)
        except Timeout:  # another worker is at it: meanwhile one that is still missing
            for other in FAMILIES:
                if not (root / other).exists() and other != name:
                    with contextlib.suppress(Timeout), FileLock(root / f"{other}.lock", timeout=0):
                        opened(other)
                        break
        with FileLock(root / f"{name}.lock"):
            return opened(name)

    return get


@pytest.fixture
def clip() -> np.ndarray:
    """Seven frames of smooth colours moving over a 16x16 picture, uint8 (7, 16, 16, 3)."""
    t, y, x = np.mgrid[0:7, 0:16, 0:16].astype(np.float64)
    channels = [np.sin(0.4 * x + 0.5 * t), np.cos(0.3 * y - 0.4 * t), np.sin(0.2 * (x + y) + t)]
    return (127.5 + 120 * np.stack(channels, axis=-1)).astype(np.uint8)


@pytest.fixture(scope="session")
def clips_folder() -> Path:
    """Real videos that are not part of the project; tests on them skip where there are none."""
    default = Path(__file__).resolve().parents[2] / "shared" / "clips"
    folder = Path(os.environ.get("CANVASMAR_RT_CLIPS", default))
    if not folder.is_dir():
        pytest.skip("no folder of real clips; set CANVASMAR_RT_CLIPS to one")
    return folder
