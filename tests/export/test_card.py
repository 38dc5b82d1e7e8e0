"""The model card: every figure in its place."""

from __future__ import annotations

import dataclasses

import pytest

from canvasmar_rt.bundle import Bundle, Difference, Parity
from canvasmar_rt.export.card import model_card
from canvasmar_rt.models.families import count_parameters

CERTIFICATE = Parity(
    engine="onnxruntime",
    tolerance=1e-4,
    drift_tolerance=1e-3,
    components={"flow": Difference(max_abs=3e-5, relative=2e-6, cosine=0.999991)},
    drift=(1e-6, 7e-6, 4e-6),
    flipped_orders=2,
)


@pytest.mark.parametrize("own", [None, 5e-1])
def test_every_figure_is_in_its_place(own: float | None) -> None:
    manifest = Bundle.open("toytable").manifest
    wide = dataclasses.replace(manifest.model.autoencoder, height=48, width=64)
    config = dataclasses.replace(manifest.model, autoencoder=wide)
    certificate = dataclasses.replace(CERTIFICATE, frame_tolerance=own)
    card = model_card(
        dataclasses.replace(
            manifest,
            model=config,
            weights_dtype="float16",
            parity=certificate,
        )
    )
    text = " ".join(card.split())
    assert f"Weights: {manifest.source}." in text
    assert "Pixels 48x64 at" in text
    assert f"{wide.latent_height}x{wide.latent_width} tokens" in text
    assert "Graphs float32, weights float16, opset 20, batch 1 to 32." in text
    assert f"| total | {sum(count_parameters(config).values()):,} |" in text
    limits = "1e-04 relative per component,"
    if own is not None:
        limits += " 5e-01 for the whole frame,"
    assert f"tolerance {limits} 1e-03 per frame of a 3-frame rollout" in text
    assert "(largest 7.00e-06; 2 frames put tokens in another order)" in text
    assert "| component | max abs | relative | cosine |" in text
    assert "| flow | 3.00e-05 | 2.00e-06 | 0.999991 |" in text
    assert "int8" not in text
