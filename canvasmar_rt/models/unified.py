"""Unified masked autoregression: one transformer for time and space (VideoMAR, MAGI).

Causal across frames, bidirectional within one, 3D rotary positions. A complete frame passes once
and leaves its keys and values; the tokens of the frame being drawn attend to them and to each
other. Letters as in `canvasmar_rt.config`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from canvasmar_rt.components import MASKED
from canvasmar_rt.config import ModelConfig
from canvasmar_rt.models.canvasmar import FrameModel, TemporalViT, gather_tokens, put_tokens
from canvasmar_rt.models.layers import attention


class UnifiedTransformer(TemporalViT):
    """`TemporalViT` with all tokens of a frame, whose layers also draw the next frame. Time i reads
    latent frame i-1 (the BOS embedding at 0) and frame i is drawn at time i+1."""

    reads_out = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.mask = nn.Parameter(torch.randn(config.dim))

    def draw_tokens(
        self, batch: int, known_tokens: Tensor | None = None, known_index: Tensor | None = None
    ) -> Tensor:
        """Input of the frame being drawn (B, N, D) in raster order: `known_tokens` (B, n, C) at
        positions `known_index` (B, n), the mask embedding at all others."""
        x = self.mask.expand(batch, self.config.tokens, -1)
        if known_tokens is None:
            return x
        assert known_index is not None
        return put_tokens(x, known_index, self.embed(known_tokens.to(x.dtype)).to(x.dtype))

    def draw(
        self,
        x: Tensor,
        select_index: Tensor,
        temporal_on: Tensor,
        time: Tensor,
        history_bias: Tensor,
        caches: Sequence[Tensor],
    ) -> Tensor:
        """Embeddings z of tokens `select_index` (B, S) of the frame being drawn.

        Args:
            x: (B, N, D), `draw_tokens`.
            temporal_on: (G,), 0 for a guidance branch that sees no history.
            time: (2, pairs), `canvasmar_rt.schedule.time_rotation` of the frame being drawn.
            history_bias: (B, F), 0 for slots this row may see, a large negative number for others.
            caches: per layer keys then values, each (F, B, N, D), this frame's predecessor among
                them.

        Returns:
            (G, B, S, D).
        """
        branches, batch, tokens = temporal_on.shape[0], x.shape[0], x.shape[1]
        heads, last = self.config.heads, len(self.blocks) - 1
        on = temporal_on[:, None, None]
        bias = on * history_bias + (1 - on) * MASKED  # (G, B, F)
        bias = bias[..., None].expand(-1, -1, -1, tokens).flatten(2).flatten(0, 1)
        bias = F.pad(bias, (0, tokens))[:, None, None].to(x.dtype)

        def rows(y: Tensor) -> Tensor:
            return y[None].expand(branches, *y.shape).flatten(0, 1)

        x, selected = rows(x), rows(select_index)
        tables = self.rotary.tables(time[None])
        for layer, block in enumerate(self.blocks):
            q, k, v = block.qkv(x, tables)
            keys, values = (
                torch.cat([rows(cache.transpose(0, 1).flatten(1, 2)), y], dim=1)
                for cache, y in zip(caches[2 * layer : 2 * layer + 2], (k, v), strict=True)
            )
            if layer == last:
                q, x = gather_tokens(q, selected), gather_tokens(x, selected)
            wide = bias.expand(-1, -1, q.shape[1], -1)
            x = block.finish(x, attention(q, keys, values, heads, wide))
        return self.norm(x).unflatten(0, (branches, batch))

    def teach(
        self,
        history: Tensor,
        drawn: Tensor,
        times: Tensor,
        frames: Tensor,
        temporal_on: Tensor,
    ) -> Tensor:
        """Frames of a clip drawn at once, each seeing the history before it (training).

        Args:
            history: (B, T, N, D), inputs at times 0..T-1 (frames BOS, 0, .., T-2), clean or not.
            drawn: (B, M, N, D), inputs of the frames being drawn.
            times: (T+1, 2, pairs), rotations of times 0..T.
            frames: (M,) int64, ascending, which frames are drawn, each in 0..T-1.
            temporal_on: (B, M), 0 for a frame that sees no history.

        Returns:
            z (B, M, N, D).
        """
        (batch, length, tokens), count = history.shape[:3], drawn.shape[1]
        heads = self.config.heads
        window = min(self.config.context_frames, length)
        device = history.device
        past = torch.arange(length, device=device)

        def windows(x: Tensor, now: Tensor) -> Tensor:
            """The last frames up to each of `now` in x (B, T*N, D): (B*len(now), window*N, D)."""
            padded = F.pad(x.reshape(batch, length, -1), (0, 0, window - 1, 0))
            # slices, because the gradient of an index or of `unfold` is a slow scatter
            parts = torch.stack([padded[:, j : j + length] for j in range(window)], dim=2)
            if len(now) < length:
                parts = parts[:, now]
            return parts.reshape(batch * len(now), window * tokens, -1)

        def bias(visible: Tensor, own: int) -> Tensor:
            """Additive, from a mask over the frames of each window (R, window) and as many `own`
            tokens, all visible: (R, 1, 1, .)."""
            out = torch.zeros(visible.shape, dtype=drawn.dtype, device=device)
            out = out.masked_fill(~visible, -math.inf).repeat_interleave(tokens, dim=-1)
            return F.pad(out, (0, own))[:, None, None]

        def within(now: Tensor) -> Tensor:
            """Which frames of the windows up to `now` lie within the clip: (len(now), window)."""
            return now[:, None] >= torch.arange(window - 1, -1, -1, device=device)

        among = bias(within(past).repeat(batch, 1), 0)
        seen = within(frames) & (temporal_on > 0)[..., None]  # (B, M, window)
        before = bias(seen.flatten(0, 1), tokens)
        past_tables = self.rotary.tables(times[:length])
        tables = self.rotary.tables(times[frames + 1])
        h, x = history.flatten(1, 2), drawn.flatten(1, 2)

        def by_frame(y: Tensor) -> Tensor:
            return y.reshape(-1, tokens, y.shape[-1])

        last = len(self.blocks) - 1
        for layer, block in enumerate(self.blocks):
            hq, hk, hv = block.qkv(h, past_tables)
            q, k, v = block.qkv(x, tables)
            keys, values = (
                torch.cat([windows(old, frames), by_frame(new)], dim=1)
                for old, new in ((hk, k), (hv, v))
            )
            x = block.finish(x, attention(by_frame(q), keys, values, heads, before).view_as(x))
            if layer < last:
                old = windows(hk, past), windows(hv, past)
                attended = attention(by_frame(hq), *old, heads, among)
                h = block.finish(h, attended.view_as(h))
        return self.norm(x).unflatten(1, (count, tokens))


class UnifiedMAR(FrameModel):
    """The whole model; its one transformer is `temporal`, and there is no canvas."""

    temporal: UnifiedTransformer
    canvas: None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, temporal=UnifiedTransformer(config), canvas=None)
