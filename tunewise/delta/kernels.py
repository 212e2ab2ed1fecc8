"""y = (W + s B A) x + b in one autograd function that keeps only x; the low-rank deltas share it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunewise.core.errors import RunError

__all__ = ["LowRankLinear", "low_rank_linear"]


def _dense_pays(tokens: int, out_features: int, in_features: int) -> bool:
    """Rebuilding W + s B A costs r out in; two thin products over all tokens cost r (in + out) each."""
    return tokens * (in_features + out_features) > out_features * in_features


class LowRankLinear(torch.autograd.Function):
    """Forward and backward by hand: four thin products in place of six, no temporaries of the output's size.

    x `[..., in]`, W `[out, in]` frozen, A `[r, in]`, B `[out, r]`. Once differentiable: asking for more
    raises.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        ctx.dense = _dense_pays(len(flat), *W.shape)
        ctx.s, ctx.shape = s, x.shape
        ctx.save_for_backward(flat, W, A, B)
        if ctx.dense:
            y = F.linear(flat, torch.addmm(W, B, A, alpha=s), b)
        else:
            y = F.linear(flat, W, b)
            y.addmm_(flat @ A.T, B.T, alpha=s)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if (
            torch.is_grad_enabled()
        ):  # create_graph=True; torch's once_differentiable stays silent where it is pruned
            raise RunError(
                "The fused low-rank product has no second derivative: attach with plain=True, or declare that "
                'the part needs "second_order".'
            )
        x, W, A, B = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        h = x @ A.T
        gh = (g @ B).mul_(ctx.s)
        grad_a = gh.T @ x
        grad_b = (h.T @ g).mul_(ctx.s).T  # (h'g)' is three times as fast as g'h here
        grad_x = None
        if ctx.needs_input_grad[0]:
            merged = torch.addmm(W, B, A, alpha=ctx.s) if ctx.dense else None
            grad_x = (g @ W).addmm_(gh, A) if merged is None else g @ merged
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, None


def low_rank_linear(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float) -> Tensor:
    """y = (W + s B A) x + b with W and b frozen; under autocast everything is in its dtype."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, W, A, B = (v.to(dtype) for v in (x, W, A, B))
        b = None if b is None else b.to(dtype)
    else:
        A, B = A.to(x.dtype), B.to(x.dtype)
    return LowRankLinear.apply(x, W, b, A, B, s)  # type: ignore[no-any-return,no-untyped-call]
