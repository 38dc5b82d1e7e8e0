"""Counter-based noise: every random number of a rollout is a pure function of its key.

Generator: Philox4x64-10 with key (seed, stream) and counter (0, 0, purpose, frame), read as
64-bit words w_0, w_1, ... in NumPy's order (the counter is incremented before each block of four).
Uniforms are u = ((w >> 12) + 0.5) * 2**-52, exact in float64 and strictly inside (0, 1).

* normals, in pairs:  z_2i = sqrt(-2 ln u_2i) cos(2 pi u_2i+1),  z_2i+1 = the same with sin
* Gumbel:             g_i = -ln(-ln u_i)

Computed in float64 and rounded to float32. A stream is one video: batch row b of a rollout reads
stream b, so batch 8 draws what eight runs of batch 1 on streams 0..7 draw, on every engine.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from canvasmar_rt.errors import ConfigError

Float32 = npt.NDArray[np.float32]


class Purpose(enum.IntEnum):
    """What a block of noise is for; part of its key, so the values never change."""

    FLOW = 0
    FRAME_AUGMENTATION = 1
    CANVAS_AUGMENTATION = 2
    ORDER = 3


def _uniform(
    seed: int, stream: int, frame: int, purpose: Purpose, count: int
) -> npt.NDArray[np.float64]:
    for name, value in (("seed", seed), ("stream", stream), ("frame", frame)):
        if not 0 <= value < 2**64:
            raise ConfigError(f"noise: {name} must lie in [0, 2**64), got {value}")
    bits = np.random.Philox(
        counter=np.array([0, 0, int(purpose), frame], np.uint64),
        key=np.array([seed, stream], np.uint64),
    ).random_raw(count)
    uniform = (bits >> np.uint64(12)).astype(np.float64)
    uniform += 0.5
    uniform *= 2.0**-52
    return uniform


def fill_normal(
    out: Float32,
    *,
    seed: int,
    streams: Sequence[int],
    frame: int,
    purpose: Purpose,
    level: float = 1.0,
) -> None:
    """Fill `out` (B, ...) float32 with standard normals, row b from `streams[b]`; with zeros, which
    cost nothing, where the `level` they will be multiplied by is 0."""
    if not level:
        out.fill(0.0)
        return
    size = math.prod(out.shape[1:])
    count = size + size % 2
    for b, stream in zip(range(len(out)), streams, strict=True):
        uniform = _uniform(seed, stream, frame, purpose, count)
        radius = np.sqrt(-2.0 * np.log(uniform[0::2]))
        angle = (2.0 * np.pi) * uniform[1::2]
        pairs = np.empty((count // 2, 2), np.float32)
        pairs[:, 0] = radius * np.cos(angle)
        pairs[:, 1] = radius * np.sin(angle)
        out[b] = pairs.reshape(-1)[:size].reshape(out.shape[1:])


def fill_gumbel(
    out: Float32, *, seed: int, streams: Sequence[int], frame: int, purpose: Purpose
) -> None:
    """Fill `out` (B, ...) float32 with standard Gumbel noise, row b from `streams[b]`."""
    size = math.prod(out.shape[1:])
    for b, stream in zip(range(len(out)), streams, strict=True):
        uniform = _uniform(seed, stream, frame, purpose, size)
        out[b] = -np.log(-np.log(uniform)).reshape(out.shape[1:])
