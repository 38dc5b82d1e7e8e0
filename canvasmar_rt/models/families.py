"""Models by family: building them, counting and casting their weights."""

from __future__ import annotations

import torch

from canvasmar_rt.config import ModelConfig
from canvasmar_rt.models.canvasmar import CanvasMAR, FrameModel
from canvasmar_rt.models.unified import UnifiedMAR

FAMILIES: dict[str, type[CanvasMAR] | type[UnifiedMAR]] = {
    "canvasmar": CanvasMAR,
    "unified": UnifiedMAR,
}


def build(config: ModelConfig, seed: int = 0) -> FrameModel:
    """An untrained model with seeded weights, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FAMILIES[config.family](config).eval()


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters of each module, without making the weights."""
    with torch.device("meta"):
        model = FAMILIES[config.family](config)
    return {
        name: sum(p.numel() for p in module.parameters()) for name, module in model.named_children()
    }


def cast(model: FrameModel, dtype: torch.dtype) -> FrameModel:
    """Cast the weights; tables that are always float32 (flow frequencies, latent statistics) keep
    their precision."""
    kept = {name: value.clone() for name, value in model.named_buffers()}
    model = model.to(dtype)
    for name, buffer in model.named_buffers():
        buffer.data = kept[name].float()
    return model
