"""y = (W + s B A) x + b in one autograd function that keeps only x; the low-rank deltas share it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunewise.core.errors import RunError

__all__ = ["LowRankLinear", "drop", "low_rank_linear"]


def _dense_pays(tokens: int, out_features: int, in_features: int) -> bool:
    """Rebuilding W + s B A costs r out in; two thin products over all tokens cost r (in + out) each."""
    return tokens * (in_features + out_features) > out_features * in_features


def _kept(x: Tensor, p: float) -> Tensor:
    """A bool mask with P(False) = p to 1/65536: four 16-bit draws from one random word, four times as fast as
    `bernoulli_`.
    """
    count = x.numel()
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device=x.device).random_(-(2**63), None)
    return words.view(torch.int16)[:count].view(x.shape) >= round(p * 65536) - 32768


def drop(x: Tensor, p: float, training: bool) -> Tensor:
    """x * mask / (1 - p): dropout from torch's global generator; the same draws as the fused product's."""
    return torch.where(_kept(x, p), x, 0.0) / (1.0 - p) if training and p else x


class LowRankLinear(torch.autograd.Function):
    """Forward and backward by hand: four thin products in place of six, no temporaries of the output's size.

    x `[..., in]`, W `[out, in]` frozen, A `[r, in]`, B `[out, r]`. With p > 0 the low-rank path sees drop(x), of
    which only the mask is kept. Once differentiable: asking for more raises.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float, p: float
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        mask = _kept(flat, p) if p else None
        ctx.dense = mask is None and _dense_pays(len(flat), *W.shape)
        ctx.s = s = s / (1.0 - p)
        ctx.shape = x.shape
        ctx.save_for_backward(flat, W, A, B, mask)
        if ctx.dense:
            y = F.linear(flat, torch.addmm(W, B, A, alpha=s), b)
        else:
            y = F.linear(flat, W, b)
            y.addmm_((flat if mask is None else torch.where(mask, flat, 0.0)) @ A.T, B.T, alpha=s)
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
        x, W, A, B, mask = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        x = x if mask is None else torch.where(mask, x, 0.0)
        h = x @ A.T
        gh = (g @ B).mul_(ctx.s)
        grad_a = gh.T @ x
        grad_b = (h.T @ g).mul_(ctx.s).T  # (h'g)' is three times as fast as g'h here
        grad_x = None
        if ctx.needs_input_grad[0]:
            if ctx.dense:
                grad_x = g @ torch.addmm(W, B, A, alpha=ctx.s)
            elif mask is None:
                grad_x = (g @ W).addmm_(gh, A)
            else:
                grad_x = (g @ W).add_(torch.where(mask, gh @ A, 0.0))
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, None, None


def low_rank_linear(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float, p: float = 0.0
) -> Tensor:
    """y = (W + s B A) x + b with W and b frozen; under autocast everything is in its dtype."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, W, A, B = (v.to(dtype) for v in (x, W, A, B))
        b = None if b is None else b.to(dtype)
    else:
        A, B = A.to(x.dtype), B.to(x.dtype)
    return LowRankLinear.apply(x, W, b, A, B, s, p)  # type: ignore[no-any-return,no-untyped-call]
