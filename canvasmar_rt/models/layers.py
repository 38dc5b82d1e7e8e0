"""Building blocks shared by the three transformers and the flow head.

Letters as in `canvasmar_rt.config`; R rows (batch times guidance branches), L tokens of a sequence,
Dh head size. Norms, rotary angles and softmax run in float32 whatever the weights' dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from canvasmar_rt.schedule import ROTARY_BASE


class LayerNorm(nn.LayerNorm):
    """Layer norm computed in float32."""

    def forward(self, x: Tensor) -> Tensor:
        traced = torch.compiler.is_compiling()  # or exporting
        alike = self.weight is None or self.weight.dtype == x.dtype
        if torch.is_autocast_enabled(x.device.type) or (alike and not traced):
            return super().forward(x)  # one kernel, which keeps float32 statistics
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class Mlp(nn.Sequential):
    """Two-layer GELU perceptron, (..., D) -> (..., D)."""

    def __init__(self, dim: int, ratio: int = 4) -> None:
        super().__init__(nn.Linear(dim, ratio * dim), nn.GELU(), nn.Linear(ratio * dim, dim))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(R, L, D) -> (R, H, L, Dh)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class _CpuAttention(torch.autograd.Function):
    """Attention for training on a CPU: the weights are kept in the inputs' dtype, which in bfloat16
    makes forward and backward several times faster than PyTorch's own kernels."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """q (R, H, Lq, Dh), k and v (R, H, Lk, Dh) -> (R, H, Lq, Dh)."""
        scores = (q @ k.transpose(-1, -2)).mul_(q.shape[-1] ** -0.5)
        if bias is not None:
            scores += bias
        weights = scores.softmax(-1)
        ctx.save_for_backward(q, k, v, weights)
        return weights @ v

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (q, k, v, weights), (d_out,) = ctx.saved_tensors, gradients
        d_weights = d_out @ v.transpose(-1, -2)
        d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
        d_scores.mul_(q.shape[-1] ** -0.5)
        d_v = weights.transpose(-1, -2) @ d_out
        return d_scores @ k, d_scores.transpose(-1, -2) @ q, d_v, None


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention over unsplit q (R, Lq, D), k and v (R, Lk, D); `bias` is added
    to the scores and broadcasts to (R, H, Lq, Lk). It is no parameter: no gradient reaches it."""
    split = split_heads(q, heads), split_heads(k, heads), split_heads(v, heads)
    trained = q.requires_grad and not torch.compiler.is_compiling()  # nor exporting
    if trained and q.device.type == "cpu":
        out = _CpuAttention.apply(*split, bias)
    else:
        out = F.scaled_dot_product_attention(*split, attn_mask=bias)
    return out.transpose(1, 2).flatten(2)


class Rotary:
    """3D rotary embedding over (t, y, x). A head's Dh/2 channel pairs go to time (a quarter), then
    to y and x in equal parts; pair i rotates (channel i, channel i + Dh/2)."""

    def __init__(self, head_dim: int, height: int, width: int) -> None:
        pairs = head_dim // 2
        self.time_pairs = head_dim // 8
        space = (pairs - self.time_pairs) // 2
        rest = pairs - self.time_pairs - space
        y = torch.arange(height).repeat_interleave(width)
        x = torch.arange(width).repeat(height)
        angle_y = y[:, None] * ROTARY_BASE ** (-torch.arange(space) / space)
        angle_x = x[:, None] * ROTARY_BASE ** (-torch.arange(rest) / rest)
        angle = torch.cat([angle_y, angle_x], dim=-1)  # (P, pairs - time_pairs)
        self._space = {angle.device: (angle.cos(), angle.sin())}

    def _space_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines (P, .) of the positions, moved to a device once: a CUDA graph cannot
        capture the copy."""
        if device not in self._space:
            with torch.inference_mode(False):
                cos, sin = next(iter(self._space.values()))
                self._space[device] = cos.to(device), sin.to(device)
        return self._space[device]

    def tables(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines (T*P, 1, 1, Dh/2) and sines (T*P, 1, 2, Dh/2), as `rotate` takes them, of frames
        with time rotations `time` (T, 2, pairs)."""
        out = []
        for part, space in enumerate(self._space_on(time.device)):
            frames, tokens = time.shape[0], space.shape[0]
            t = time[:, None, part].expand(frames, tokens, self.time_pairs)
            s = space[None].expand(frames, tokens, space.shape[1])
            out.append(torch.cat([t, s], dim=-1).flatten(0, 1))
        return rotation_tables(*out)


def rotation_tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (L, Dh/2) of the tokens' angles as `rotate` takes them."""
    return cos[:, None, None], torch.stack([-sin, sin], dim=-2)[:, None]


def rotate(x: Tensor, tables: tuple[Tensor, Tensor], heads: int) -> Tensor:
    """Rotate x (R, L, D) by tables (L, 1, 1 and 2, Dh/2), the same for every head, in float32."""
    cos, sin = tables
    pairs = x.float().unflatten(-1, (heads, 2, -1))  # (R, L, H, 2, Dh/2)
    out = pairs * cos + pairs.flip(-2) * sin
    return out.flatten(-3).to(x.dtype)


def split_qkv(
    qkv: Tensor, tables: tuple[Tensor, Tensor] | None, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (R, L, D) of their projection (R, L, 3*D), queries and keys rotated
    together where there are `tables`."""
    if tables is None:
        q, k, v = qkv.chunk(3, dim=-1)
        return q, k, v
    dim = qkv.shape[-1] // 3
    qk, v = qkv.split([2 * dim, dim], dim=-1)
    q, k = rotate(qk, tables, 2 * heads).chunk(2, dim=-1)
    return q, k, v


class Attention(nn.Module):
    """Multi-head attention weights: one projection for queries, keys and values, one back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)


class Experts(nn.Module):
    """One module per token segment. A sequence is [condition | mask | known] with `lengths` of the
    three; one expert serves all, three one each. The two of MM-DiT are called one by one."""

    def __init__(self, count: int, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(make() for _ in range(count))

    def forward(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        if len(self.experts) == 1:
            return self.experts[0](x)
        if x.requires_grad and not torch.compiler.is_compiling():  # one gradient, not one a slice
            pieces = zip(self.experts, x.split(list(lengths), dim=1), strict=True)
            return torch.cat([expert(y) for expert, y in pieces if y.shape[1]], dim=1)
        parts, start = [], 0
        for expert, size in zip(self.experts, lengths, strict=True):
            if isinstance(size, int) and size == 0:
                continue
            parts.append(expert(x[:, start : start + size]))
            start = start + size
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def init_weights(module: nn.Module) -> None:
    """Fan-in scaled weights, zero biases: activations keep their scale through any depth, so that
    an untrained model is a meaningful test of numerics."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        fan_in = module.weight[0].numel()
        nn.init.trunc_normal_(module.weight, std=fan_in**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
