"""Attention in training against PyTorch's own kernel, layer norm against float32. Letters as in
`canvasmar_rt.config`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from canvasmar_rt.models.layers import LayerNorm, attention

R, H, D = 3, 2, 16


def inputs(queries: int, keys: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q (R, queries, D), k and v (R, keys, D), and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    lengths = (queries, keys, keys, queries)
    q, k, v, g = (torch.randn(R, n, D, generator=generator, dtype=torch.float64) for n in lengths)
    return q.to(dtype), k.to(dtype), v.to(dtype), g.to(dtype)


def masks(keys: int) -> dict[str, Tensor | None]:
    hidden = torch.zeros(R, 1, 1, keys, dtype=torch.float64)
    hidden[1, ..., 1:] = -torch.inf
    by_query = torch.randn(5, keys, generator=torch.Generator().manual_seed(1)).double()
    return {"none": None, "of a row": hidden, "of a query": by_query}


@pytest.mark.parametrize("name", masks(1))
def test_gradients_are_those_of_pytorch(name: str) -> None:
    q, k, v, g = inputs(5, 7, torch.float64)
    bias = masks(7)[name]
    found = []
    for trained in (True, False):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        if trained:
            out = attention(*leaves, heads=H, bias=bias)
        else:
            split = [x.unflatten(-1, (H, -1)).transpose(1, 2) for x in leaves]
            with sdpa_kernel(SDPBackend.MATH):
                out = torch.nn.functional.scaled_dot_product_attention(*split, attn_mask=bias)
            out = out.transpose(1, 2).flatten(2)
        found.append([out, *torch.autograd.grad(out, leaves, g)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_training_and_inference_agree() -> None:
    q, k, v, _ = inputs(5, 7, torch.float32)
    out = attention(q.clone().requires_grad_(), k, v, H)
    assert out.grad_fn is not None
    torch.testing.assert_close(out.detach(), attention(q, k, v, H))


def test_bfloat16_is_as_near_as_its_precision() -> None:
    q, k, v, g = inputs(64, 200, torch.bfloat16)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    rounded = [x.requires_grad_() for x in (q, k, v)]
    of = torch.autograd.grad(attention(*exact, heads=H), exact, g.double())
    near = torch.autograd.grad(attention(*rounded, heads=H), rounded, g)
    for mine, truth in zip(near, of, strict=True):
        assert mine.dtype == torch.bfloat16
        error = (mine.double() - truth).norm() / truth.norm()
        assert error < 0.02


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layer_norm_rounds_once(dtype: torch.dtype, affine: bool) -> None:
    """In one kernel as in float32, but for the last bit: also of numbers far from zero, whose
    variance half precision would lose."""
    generator = torch.Generator().manual_seed(2)
    x = (torch.randn(R, 64, generator=generator) + 30).to(dtype)
    norm = LayerNorm(64, elementwise_affine=affine)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    norm.to(dtype)
    weight, bias = ((p.double() if affine else None) for p in (norm.weight, norm.bias))
    exact = torch.nn.functional.layer_norm(x.double(), (64,), weight, bias, norm.eps)
    with torch.no_grad():
        out = norm(x)
    assert out.dtype == dtype
    bits = {torch.float32: 2e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(out.double(), exact, rtol=bits, atol=1e-4)
