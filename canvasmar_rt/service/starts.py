"""Start pictures: pieces of a clip that sessions begin from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from canvasmar_rt.config import ModelConfig
from canvasmar_rt.video import read_clip

UInt8 = npt.NDArray[np.uint8]

LATENT_FRAMES = 3
MOST = 16


def cut_starts(config: ModelConfig, clip: Path) -> tuple[UInt8, ...]:
    """Up to `MOST` contexts, uint8 (1 + 2*t, H, W, 3), cut one after the other from a clip.

    Raises:
        VideoError: if the clip cannot be read or is shorter than one context.
    """
    ae = config.autoencoder
    stride = (LATENT_FRAMES - 1) * ae.temporal_compression
    frames = read_clip(
        clip,
        size=(ae.height, ae.width),
        fps=config.fps,
        max_frames=1 + MOST * stride,
        min_frames=1 + stride,
    ).frames
    return tuple(frames[i : i + 1 + stride] for i in range(0, len(frames) - stride, stride))
