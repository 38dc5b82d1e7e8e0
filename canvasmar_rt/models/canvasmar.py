"""The CanvasMAR modules: Temporal ViT, Canvas ViT, Spatial MAR and flow head (paper, sec. 4).

Nothing is stored on a module between calls: caches, noise and indices come in and go out.
Latents are (B, N, C) tokens in raster order. Shape suffixes use the letters of
`canvasmar_rt.config`; R is rows, batch times guidance branches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from canvasmar_rt.config import FlowConfig, ModelConfig
from canvasmar_rt.models.autoencoder import Autoencoder
from canvasmar_rt.models.layers import (
    Attention,
    Experts,
    LayerNorm,
    Mlp,
    Rotary,
    attention,
    init_weights,
    split_qkv,
)

QUERY_FRAMES = 2
"""Frames of a clip whose attention the Temporal ViT computes at a time in training on a CPU."""


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Pick tokens `index` (B, n) int64 of x (B, N, C): (B, n, C)."""
    return torch.gather(x, 1, index[..., None].expand(-1, -1, x.shape[-1]))


def put_tokens(x: Tensor, index: Tensor, tokens: Tensor, *, add: bool = False) -> Tensor:
    """x (B, N, C) with `tokens` (B, n, C) at positions `index` (B, n) int64, added to what is there
    with `add`."""
    if add:
        tokens = tokens + gather_tokens(x, index)
    return torch.scatter(x, 1, index[..., None].expand_as(tokens), tokens)


class VitBlock(nn.Module):
    """Pre-norm transformer block; `forward` is plain bidirectional self-attention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = LayerNorm(dim), LayerNorm(dim)
        self.attn, self.mlp = Attention(dim), Mlp(dim)

    def qkv(
        self, x: Tensor, tables: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return split_qkv(self.attn.qkv(self.norm1(x)), tables, self.heads)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.attn.out(attended)
        return x + self.mlp(self.norm2(x))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        return self.finish(x, attention(q, k, v, self.heads))


class TemporalViT(nn.Module):
    """Reads the latent frame before frame i and gives z_t for frame i (sec. 4.1): causal across
    frames, bidirectional within one, 3D rotary positions."""

    reads_out = True
    """Whether anyone wants z_t; else `step` ends with the last layer's keys and values."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        dim, patch = config.dim, config.temporal_patch
        grid_h = config.autoencoder.latent_height // patch
        grid_w = config.autoencoder.latent_width // patch
        self.embed = nn.Linear(config.autoencoder.latent_channels * patch**2, dim)
        self.bos = nn.Parameter(torch.randn(config.temporal_tokens, dim))
        self.blocks = nn.ModuleList(
            VitBlock(dim, config.heads) for _ in range(config.temporal_layers)
        )
        self.norm = LayerNorm(dim)
        if config.action_dim:
            self.action = nn.Linear(config.action_dim, dim)
            self.no_action = nn.Parameter(torch.randn(dim))
        self.rotary = Rotary(config.head_dim, grid_h, grid_w)

    def _tokens(
        self, latent_BNC: Tensor, is_first: Tensor, action: Tensor | None, given: Tensor | None
    ) -> Tensor:
        """Embed latent frames (B, N, C), or the BOS embedding where `is_first` (B,) is 1, plus the
        action (B, A), or the learned null action where `given` (B,) is 0: (B, P, D)."""
        p, ae = self.config.temporal_patch, self.config.autoencoder
        grid = latent_BNC.unflatten(1, (ae.latent_height // p, p, ae.latent_width // p, p))
        patches = grid.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)  # (B, P, p*p*C)
        first = is_first.to(latent_BNC.dtype)[:, None, None]
        x = (1 - first) * self.embed(patches.to(self.bos.dtype)) + first * self.bos
        if self.config.action_dim:
            assert action is not None
            assert given is not None
            on = given[:, None].to(x.dtype)
            told = on * self.action(action.to(self.bos.dtype)) + (1 - on) * self.no_action
            x = x + told[:, None]
        return x.to(self.bos.dtype)

    def embed_frames(
        self,
        latents_BTNC: Tensor,
        is_first: Tensor,
        actions: Tensor | None,
        actions_given: Tensor | None,
    ) -> Tensor:
        """Input tokens (B, T, P, D) of a clip; arguments as for `forward`."""

        def flat(y: Tensor | None) -> Tensor | None:
            return None if y is None else y.flatten(0, 1)

        x = self._tokens(
            latents_BTNC.flatten(0, 1), is_first.flatten(), flat(actions), flat(actions_given)
        )
        return x.unflatten(0, latents_BTNC.shape[:2])

    def step(
        self,
        latent_BNC: Tensor,
        is_first: Tensor,
        action: Tensor | None,
        action_given: Tensor | None,
        time: Tensor,
        cache_bias: Tensor,
        caches: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """One frame.

        Args:
            latent_BNC: latent frame i-1; ignored in rows where `is_first` (B,) is 1 (BOS).
            action, action_given: (B, A) and (B,), None if the model takes no actions.
            time: (2, pairs), `canvasmar_rt.schedule.time_rotation` of this step.
            cache_bias: (B, F), 0 for slots this row may see, a large negative number for others.
            caches: per layer keys then values, each (F, B, P, D), keys rotated at their own time.

        Returns:
            z_t (B, P, D), and per layer the new keys and values, each (B, P, D).
        """
        x = self._tokens(latent_BNC, is_first, action, action_given)
        tables = self.rotary.tables(time[None])
        batch, tokens = x.shape[0], self.config.temporal_tokens
        frames = self.config.context_frames
        bias = cache_bias[:, :, None].expand(-1, -1, tokens).reshape(batch, frames * tokens)
        bias = F.pad(bias, (0, tokens))[:, None, None].to(x.dtype)  # this frame sees itself
        bias = bias.expand(-1, -1, tokens, -1)
        new: list[Tensor] = []
        for layer, block in enumerate(self.blocks):
            q, k, v = block.qkv(x, tables)
            new += [k, v]
            if layer + 1 == len(self.blocks) and not self.reads_out:
                break
            keys, values = (
                torch.cat([cache.transpose(0, 1).flatten(1, 2), y], dim=1)
                for cache, y in zip(caches[2 * layer : 2 * layer + 2], (k, v), strict=True)
            )
            x = block.finish(x, attention(q, keys, values, self.config.heads, bias))
        return self.norm(x), new

    def forward(
        self,
        latents_BTNC: Tensor,
        is_first: Tensor,
        actions: Tensor | None,
        actions_given: Tensor | None,
        times: Tensor,
    ) -> Tensor:
        """All frames of a clip at once (training): (B, T, N, C) -> z_t (B, T, P, D). Frame i sees
        frames i-F+1..i, as the ring cache does. `is_first`, `actions_given` (B, T), `actions`
        (B, T, A), `times` (T, 2, pairs)."""
        frames = latents_BTNC.shape[1]
        x = self.embed_frames(latents_BTNC, is_first, actions, actions_given)
        x = x.flatten(1, 2)  # (B, T*P, D)
        frame = torch.arange(frames, device=x.device).repeat_interleave(self.config.temporal_tokens)
        age = frame[:, None] - frame[None]
        visible = (age >= 0) & (age < self.config.context_frames)
        bias = torch.zeros(visible.shape, dtype=x.dtype, device=x.device)
        bias = bias.masked_fill(~visible, -math.inf)
        tables = self.rotary.tables(times)
        for block in self.blocks:
            q, k, v = block.qkv(x, tables)
            x = block.finish(x, self._in_window(q, k, v, bias))
        return self.norm(x).unflatten(1, (frames, -1))

    def _in_window(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """Attention of a clip's queries (B, T*P, D) to the F frames each may see, `QUERY_FRAMES` at
        a time: of the scores that `bias` (T*P, T*P) hides few are computed. For a GPU launches cost
        more than scores."""
        if q.device.type != "cpu":
            return attention(q, k, v, self.config.heads, bias)
        tokens, window = self.config.temporal_tokens, self.config.context_frames
        out = []
        for i, queries in enumerate(q.split(QUERY_FRAMES * tokens, dim=1)):
            first = i * QUERY_FRAMES
            asks = slice(first * tokens, (first + QUERY_FRAMES) * tokens)
            seen = slice(max(0, first + 1 - window) * tokens, asks.stop)
            keys, values = k[:, seen], v[:, seen]
            out.append(attention(queries, keys, values, self.config.heads, bias[asks, seen]))
        return torch.cat(out, dim=1)


class GridConv(nn.Module):
    """Two 3x3 convolutions over the tokens of a frame as a picture, added to them (not in the
    paper): what moves goes to the neighbouring tokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        ae, width = config.autoencoder, config.canvas_conv
        self.grid = (ae.latent_height, ae.latent_width)
        self.norm = LayerNorm(config.dim)
        self.conv1 = nn.Conv2d(config.dim, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, config.dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        picture = self.norm(x).unflatten(1, self.grid).permute(0, 3, 1, 2)
        moved: Tensor = self.conv2(F.silu(self.conv1(picture)))
        return x + moved.permute(0, 2, 3, 1).flatten(1, 2)


class CanvasViT(nn.Module):
    """Guesses the next frame in one pass from z_t and the most recent frame (sec. 4.2), or the next
    J, each from a two-layer perceptron of its own (App. B)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, channels = config.dim, config.autoencoder.latent_channels
        self.embed = nn.Linear(channels, dim)
        self.position = nn.Parameter(torch.randn(config.tokens, dim))
        self.blocks = nn.ModuleList(
            VitBlock(dim, config.heads) for _ in range(config.canvas_layers)
        )
        convs = config.canvas_layers if config.canvas_conv else 0
        self.convs = nn.ModuleList(GridConv(config) for _ in range(convs))
        self.norm = LayerNorm(dim)
        heads = config.group if config.group > 1 else 0
        self.heads = nn.ModuleList(Mlp(dim, ratio=1) for _ in range(heads))
        self.canvas = nn.Linear(dim, channels)
        self.residual = config.residual
        self.staticness = nn.Linear(dim, 1)

    def forward(
        self, z_temporal: Tensor, noised_BNC: Tensor, latent_BNC: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """z_t (B, P, D) and the latest frame, noised by eq. 11 and as it is, give the canvas tokens
        z_c (B, N, D), the canvas (B, N, C), eq. 5, and staticness (B, N) in 0..1, eq. 7; of a group
        each is (B, J, N, ...)."""
        x = self.embed(noised_BNC.to(z_temporal.dtype)) + self.position
        x = torch.cat([z_temporal, x], dim=1)
        p = z_temporal.shape[1]
        for i, block in enumerate(self.blocks):
            x = block(x)
            if self.convs:
                x = torch.cat([x[:, :p], self.convs[i](x[:, p:])], dim=1)
        z_canvas = self.norm(x[:, p:])
        if self.heads:
            z_canvas = torch.stack([z_canvas + head(z_canvas) for head in self.heads], dim=1)
        staticness = self.staticness(z_canvas).float().sigmoid()[..., 0]
        canvas = self.canvas(z_canvas).float()
        if self.residual:
            canvas = canvas + (latent_BNC[:, None] if self.heads else latent_BNC)
        return z_canvas, canvas, staticness


Pieces = tuple[Tensor | None, Tensor | None]
"""The tokens of a spatial block: all of them and None, or MM-DiT's two streams, condition and mask
tokens in one, known tokens in the other, one of which may be absent."""


class SpatialBlock(nn.Module):
    """Block over [condition | mask | known] tokens with expert norms or MM-DiT weights. MM-DiT's
    streams meet in the attention alone: between blocks each stays in one piece of memory."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads, self.apart = config.heads, config.norm == "mmdit"
        norms = {"shared": 1, "expert": 3, "mmdit": 2}[config.norm]
        streams = 2 if self.apart else 1
        self.norm1 = Experts(norms, lambda: LayerNorm(dim))
        self.norm2 = Experts(norms, lambda: LayerNorm(dim))
        self.qkv = Experts(streams, lambda: nn.Linear(dim, 3 * dim))
        self.out = Experts(streams, lambda: nn.Linear(dim, dim))
        self.mlp = Experts(streams, lambda: Mlp(dim))

    def forward(
        self,
        pieces: Pieces,
        lengths: Sequence[int],
        condition: tuple[Tensor, Tensor] | None = None,
        select: int | None = None,
    ) -> tuple[Pieces, tuple[Tensor, Tensor]]:
        """Pieces (R, L, D) -> such pieces and their own keys and values. `condition` adds keys and
        values (R, P, D) computed before; `select` returns only the first so many mask tokens."""
        there = [(i, x) for i, x in enumerate(pieces) if x is not None]
        made = [self.qkv.experts[i](self._norm(self.norm1, i, x, lengths)) for i, x in there]
        qkv = made[0] if len(made) == 1 else torch.cat(made, dim=1)
        q, k, v = qkv.chunk(3, dim=-1)
        keys, values = k, v
        if condition is not None:
            keys = torch.cat([condition[0], k], dim=1)
            values = torch.cat([condition[1], v], dim=1)
        if select is not None:
            start, (i, x) = lengths[0], there[0]
            for sliced in (x, q):  # torch 2.11 cannot trace a slice without
                torch._check(start + select <= sliced.shape[1])
            q, there = q[:, start : start + select], [(i, x[:, start : start + select])]
            lengths = (0, select, 0)
        mixed = attention(q, keys, values, self.heads)
        done: list[Tensor | None] = [None, None]
        at = 0
        for i, x in there:
            size = x.shape[1]
            # an expert's product takes its rows from one place
            part = mixed if len(there) == 1 else mixed[:, at : at + size].contiguous()
            x = x + self.out.experts[i](part)
            done[i] = x + self.mlp.experts[i](self._norm(self.norm2, i, x, lengths))
            at = at + size
        return (done[0], done[1]), (k, v)

    def _norm(self, norm: Experts, stream: int, x: Tensor, lengths: Sequence[int]) -> Tensor:
        made: Tensor = norm.experts[stream](x) if self.apart else norm(x, lengths)
        return made


class GroupAttention(nn.Module):
    """Attention among the tokens that the frames of a group have at one position (App. B)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.group, self.heads = config.group, config.heads
        self.norm, self.attn = LayerNorm(config.dim), Attention(config.dim)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """x (R, N, D), row r being frame r % J of its group, with token i at position `index`
        (R, N) of its frame."""
        grid = put_tokens(torch.zeros_like(x), index, x).unflatten(0, (-1, self.group))
        q, k, v = self.attn.qkv(self.norm(grid)).transpose(1, 2).flatten(0, 1).chunk(3, dim=-1)
        mixed = self.attn.out(attention(q, k, v, self.heads))  # (R/J*N, J, D)
        mixed = mixed.unflatten(0, (-1, x.shape[1])).transpose(1, 2).flatten(0, 1)
        return x + gather_tokens(mixed, index)


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [x for x in parts if x is not None]
    if len(there) > 1:
        return torch.cat(there, dim=1)
    return there[0] if there else None


class SpatialMAR(nn.Module):
    """Embeds the tokens to draw next from the condition z_t, the tokens drawn so far and canvas
    tokens for all others (sec. 4.2, NOVA's encoder/decoder split). The frames of a group are rows
    of their own, which meet in every fourth layer that sees whole frames."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.apart = config, config.norm == "mmdit"
        dim = config.dim
        self.embed = nn.Linear(config.autoencoder.latent_channels, dim)
        self.encoder_position = nn.Parameter(torch.randn(config.tokens, dim))
        self.decoder_position = nn.Parameter(torch.randn(config.tokens, dim))
        self.mask = nn.Parameter(torch.randn(dim))
        self.no_temporal = nn.Parameter(torch.randn(dim))
        self.blocks = nn.ModuleList(SpatialBlock(config) for _ in range(config.spatial_layers))
        self.norm = LayerNorm(dim)
        if config.group > 1:
            self.frame = nn.Parameter(torch.randn(config.group, dim))
            self.group = nn.ModuleDict(
                {str(layer): GroupAttention(config) for layer in config.group_layers}
            )

    @property
    def isolated(self) -> bool:
        return self.config.condition_attention == "isolated"

    def condition_keys_values(self, condition: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Per layer keys and values (R, P, D) of condition tokens that attend only to each other:
        computed once a frame, the same for all AR steps."""
        lengths = (condition.shape[1], 0, 0)
        cached, pieces = [], (condition, None)
        for block in self.blocks:
            pieces, kv = block(pieces, lengths)
            cached.append(kv)
        return cached

    def read_condition(self, condition: Tensor) -> Tensor | list[tuple[Tensor, Tensor]]:
        """Condition tokens (R, P, D) as `forward` takes them: themselves, or what is computed of
        isolated ones once a frame."""
        return self.condition_keys_values(condition) if self.isolated else condition

    def forward(
        self,
        condition: Tensor | list[tuple[Tensor, Tensor]],
        canvas_tokens: Tensor,
        mask_index: Tensor,
        select: int,
        known_tokens: Tensor | None = None,
        known_index: Tensor | None = None,
    ) -> Tensor:
        """Token embeddings z of the next set.

        Args:
            condition: (R, P, D) condition tokens, or, for isolated condition attention, their
                keys and values per layer from `condition_keys_values`; (R/J, P, D) where groups
                are drawn, whose frames share them.
            canvas_tokens: (R, N, D) z_c or mask embeddings, in raster order.
            mask_index: (R, M) int64, positions not drawn yet, the next set first.
            select: how many of them make up the next set.
            known_tokens, known_index: (R, n, C) and (R, n), tokens drawn so far and their
                positions; None in the first AR step.

        Of a model that draws groups, row r is frame r % J of its group.

        Returns:
            (R, select, D).
        """
        shape = canvas_tokens.shape
        head = self.config.encoder_layers
        last = self.config.spatial_layers - 1
        cached: Sequence[tuple[Tensor, Tensor] | None]
        if isinstance(condition, list):
            cached = [(self._each_frame(k), self._each_frame(v)) for k, v in condition]
            seen, p = None, 0
        else:
            cached, seen, p = [None] * (last + 1), self._each_frame(condition), condition.shape[1]
        known, drawn = 0, None
        if known_tokens is not None:
            assert known_index is not None
            known = known_index.shape[1]
            position = F.embedding(known_index, self.encoder_position)
            drawn = self._in_group(self.embed(known_tokens.to(position.dtype)) + position)
        if seen is not None or drawn is not None:
            pieces = self._pieces([seen], drawn)
            for block, kv in zip(self.blocks[:head], cached[:head], strict=True):
                pieces, _ = block(pieces, (p, 0, known), kv)
            seen, drawn = self._parts(pieces, p, drawn is not None)
        mask = gather_tokens(canvas_tokens, mask_index)
        mask = self._in_group(mask + F.embedding(mask_index, self.decoder_position))
        if drawn is not None:
            assert known_index is not None
            drawn = drawn + F.embedding(known_index, self.decoder_position)
        left = shape[1] if known_tokens is None else mask_index.shape[1]
        pieces = self._pieces([seen, mask], drawn)
        for layer in range(head, last + 1):
            chosen = select if layer == last else None
            pieces, _ = self.blocks[layer](pieces, (p, left, known), cached[layer], chosen)
            if self.config.group > 1 and str(layer) in self.group:
                index = mask_index
                if known_index is not None:
                    index = torch.cat([mask_index, known_index], dim=1)
                pieces = self._met(self.group[str(layer)], pieces, p, left, index)
        made: Tensor = self.norm(pieces[0])
        return made

    def _pieces(self, first: Sequence[Tensor | None], known: Tensor | None) -> Pieces:
        """Condition and mask tokens, as far as there are any, and the known ones."""
        if self.apart:
            return _joined(first), known
        return _joined([*first, known]), None

    def _parts(self, pieces: Pieces, p: int, known: bool) -> Pieces:
        """The encoder's p condition tokens and its known ones, as far as there are any."""
        x = pieces[0]
        if self.apart or x is None:
            return pieces
        return x[:, :p] if p else None, x[:, p:] if known else None

    def _met(
        self, attention: nn.Module, pieces: Pieces, p: int, left: int, index: Tensor
    ) -> Pieces:
        """Mask and known tokens after the frames of a group have met; condition tokens stay."""
        first, known = pieces
        assert first is not None
        whole = attention(_joined([first[:, p:] if p else first, known]), index)
        kept = first[:, :p] if p else None
        if known is None:
            return _joined([kept, whole]), None
        return _joined([kept, whole[:, :left]]), whole[:, left:]

    def _each_frame(self, x: Tensor) -> Tensor:
        """x (R/J, P, D), what the frames of a group share, for each of them: (R, P, D)."""
        if self.config.group == 1:
            return x
        return x[:, None].expand(-1, self.config.group, -1, -1).flatten(0, 1)

    def _in_group(self, x: Tensor) -> Tensor:
        """x (R, n, D), rows of a group told which frame they are."""
        if self.config.group == 1:
            return x
        return (x.unflatten(0, (-1, self.config.group)) + self.frame[:, None]).flatten(0, 1)


class FlowHead(nn.Module):
    """Draws each token by rectified flow given its embedding z (eq. 4; adaLN perceptron of MAR).

    All adaLN modulations of a call come from one matrix product: [shift, scale, gate] of every
    block, then [shift, scale] of the output norm."""

    def __init__(self, channels: int, dim: int, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.embed = nn.Linear(channels, width)
        self.condition = nn.Linear(dim, width)
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        modulations = width * config.modulations
        self.modulation = nn.Linear(width, modulations)
        if self.additive:
            self.time_modulation = nn.Linear(width, modulations, bias=False)
        self.norms = nn.ModuleList(LayerNorm(width, eps=1e-6) for _ in range(config.blocks))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(config.blocks)
        )
        self.final_norm = LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.out = nn.Linear(width, channels)
        frequency = torch.exp(-math.log(10000.0) * torch.arange(128) / 128)
        self.register_buffer("frequency", frequency, persistent=False)

    @property
    def additive(self) -> bool:
        return self.config.modulation == "additive"

    def embed_time(self, time: Tensor) -> Tensor:
        """Flow times (E,) float32 in 0..1 -> what `velocity` needs of them, (E, width), or
        (E, modulations) for additive modulation."""
        angle = 1000.0 * time[:, None].float() * self.frequency.float()
        features = torch.cat([angle.cos(), angle.sin()], dim=-1)
        embedded = self.time(features.to(self.out.weight.dtype))
        if self.additive:
            embedded = self.time_modulation(F.silu(embedded))
        return embedded

    def embed_condition(self, z: Tensor) -> Tensor:
        """Token embeddings (..., D) -> what `velocity` needs of them, computed once per token."""
        c = self.condition(z)
        return self.modulation(F.silu(c)) if self.additive else c

    def velocity(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """Velocity (..., C) float32 of tokens x (..., C) given one row of `embed_time` and the
        rows of `embed_condition`; leading dimensions broadcast (guidance branches share x)."""
        m = time + condition
        if not self.additive:
            m = self.modulation(F.silu(m))
        return self.modulated(x, self.parts(m))

    def given(self, condition: Tensor) -> tuple[Tensor, ...]:
        """`embed_condition` as `evaluate` takes it in an exported graph: for additive modulation in
        its parts, which are then cut once and not at every evaluation."""
        return self.parts(condition) if self.additive else (condition,)

    def evaluate(self, x: Tensor, time: Tensor, given: Sequence[Tensor]) -> Tensor:
        """`velocity` of a condition, or of its parts (`given`); eager PyTorch is faster with it
        whole."""
        if len(given) == 1:
            return self.velocity(x, time, given[0])
        parts = zip(time.chunk(len(given), -1), given, strict=True)
        return self.modulated(x, tuple(t + c for t, c in parts))

    def modulated(self, x: Tensor, parts: Sequence[Tensor], *, shifted: bool = False) -> Tensor:
        """Velocity of tokens x (..., C) from the modulations one by one, where what multiplies is
        1 + scale. Of `shifted` ones the last shift (..., C) is added behind the output layer."""
        h = self.embed(x.to(parts[0].dtype))
        for i, (norm, mlp) in enumerate(zip(self.norms, self.mlps, strict=True)):
            shift, scale, gate = parts[3 * i : 3 * i + 3]
            h = h + gate * mlp(norm(h) * scale + shift)
        shift, scale = parts[-2:]
        scaled = self.final_norm(h) * scale
        return (self.out(scaled) + shift if shifted else self.out(scaled + shift)).float()

    def parts(self, m: Tensor) -> tuple[Tensor, ...]:
        """Modulations (..., M) one by one; what is to be 1 + scale is that here."""
        parts = m.chunk(self.config.modulations, dim=-1)
        return tuple(part + 1 if i % 3 == 1 else part for i, part in enumerate(parts))


class FrameModel(nn.Module):
    """What every family has: a frame-causal transformer with a ring cache, a flow head that draws
    tokens, an autoencoder, and perhaps a canvas."""

    temporal: TemporalViT
    canvas: CanvasViT | None

    def __init__(self, config: ModelConfig, **parts: nn.Module | None) -> None:
        super().__init__()
        self.config = config
        for name, part in parts.items():
            setattr(self, name, part)
        self.flow = FlowHead(config.autoencoder.latent_channels, config.dim, config.flow)
        self.apply(init_weights)
        self.autoencoder = Autoencoder(config.autoencoder)

    @property
    def device(self) -> torch.device:
        return self.flow.out.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.flow.out.weight.dtype


def in_branches(on: Tensor, seen: Tensor, hidden: Tensor) -> Tensor:
    """`seen` (R, n, D) in the guidance branches where `on` (G,) is 1, `hidden`, which broadcasts
    against it, in the others: (G, R, n, D)."""
    return torch.where(on[:, None, None, None] > 0, seen, hidden)


class CanvasMAR(FrameModel):
    """The whole model; `canvas` is None for the no-canvas baseline."""

    spatial: SpatialMAR

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(
            config,
            temporal=TemporalViT(config),
            canvas=CanvasViT(config) if config.canvas else None,
            spatial=SpatialMAR(config),
        )

    def condition_tokens(self, z_temporal: Tensor, temporal_on: Tensor) -> Tensor:
        """z_t (B, P, D), or the learned vector where a branch does not see it, `temporal_on` (G,)
        being 0: (G, B, P, D)."""
        return in_branches(temporal_on, z_temporal, self.spatial.no_temporal)

    def mask_tokens(self, z_canvas: Tensor, canvas_on: Tensor) -> Tensor:
        """z_c (R, N, D), already noised by eq. 12, or the mask embedding where a branch does not
        see it: (G, R, N, D)."""
        return in_branches(canvas_on, z_canvas, self.spatial.mask)
