"""The model card of a bundle."""

from __future__ import annotations

from canvasmar_rt.bundle import Manifest
from canvasmar_rt.export.quantize import NARROWEST, SMALLEST
from canvasmar_rt.models.families import count_parameters

INT8 = f"""
Matrix products over tokens, from {SMALLEST} x {SMALLEST} on, are int8, and so are the 3x3
convolutions of canvas and decoder to {NARROWEST} channels or more: weights with a scale for every
output channel, activations with one for the whole tensor, found at run time. For the CPU only:
TensorRT takes no such products, so its operator table was not applied to these graphs.
"""

INT8_PARITY = """
What is compared is int8 graphs with the float32 model: the differences are those of 8 bits. In a
rollout they add up from frame to frame and reorder tokens of similar staticness; the comparison
shares one order.
"""


def model_card(manifest: Manifest, more: str = "") -> str:
    """Markdown: where the weights come from, sizes, the parity certificate, and `more`."""
    config, ae, parity = manifest.model, manifest.model.autoencoder, manifest.parity
    assert parity is not None
    counts = count_parameters(config)
    rows = "\n".join(f"| {k} | {v:,} |" for k, v in counts.items())
    checks = "\n".join(
        f"| {k} | {d.max_abs:.2e} | {d.relative:.2e} | {d.cosine:.6f} |"
        for k, d in parity.components.items()
    )
    quantized = manifest.quantization == "int8"
    limits = f"{parity.tolerance:.0e} relative per component,"
    if parity.frame_tolerance is not None:
        limits += f" {parity.frame_tolerance:.0e} for the whole frame,"
    return f"""# {config.name}

A canvasmar-rt bundle. Weights: {manifest.source}.

Pixels {ae.height}x{ae.width} at {config.fps:g} frames a second; one latent frame is
{ae.temporal_compression} pixel frames and {ae.latent_height}x{ae.latent_width} tokens of
{ae.latent_channels} channels; window of {config.context_frames} latent frames; actions:
{config.action_dim or "none"}. Graphs {manifest.dtype}, weights {manifest.weights_dtype}, opset
{manifest.opset}, batch {manifest.batch.minimum} to {manifest.batch.maximum}.
{INT8 if quantized else ""}
| module | parameters |
|---|---|
{rows}
| total | {sum(counts.values()):,} |

## Parity

{parity.engine} against PyTorch float32; tolerance {limits}
{parity.drift_tolerance:.0e} per frame of a {len(parity.drift)}-frame rollout (largest
{max(parity.drift):.2e}; {parity.flipped_orders} frames put tokens in another order).
{INT8_PARITY if quantized else ""}
| component | max abs | relative | cosine |
|---|---|---|---|
{checks}
{more and chr(10) + more}"""
