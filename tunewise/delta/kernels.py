"""y = diag(d) (W + s B A) x + b in one autograd function that keeps only x; the low-rank deltas share it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunewise.core.errors import RunError

from .dropout import blank, drop, dropped, new_seed, room

__all__ = ["LowRankLinear", "drop", "low_rank_linear"]

CHUNK = 128
"""Rows at a time of a product that is only summed: so many stay in the cache."""


def _dense_pays(tokens: int, out_features: int, in_features: int) -> bool:
    """Rebuilding W + s B A costs r out in; two thin products over all tokens cost r (in + out) each."""
    return tokens * (in_features + out_features) > out_features * in_features


def _wide(tokens: int, W: Tensor) -> bool:
    """Whether the change is written into W; in half precision W would round a small one away."""
    return W.dtype in (torch.float32, torch.float64) and _dense_pays(tokens, *W.shape)


def _dense(w: Tensor, a: Tensor, u: Tensor, d: Tensor | None, s: float, masked: bool) -> Tensor:
    """diag(d) (W + s B A); under dropout diag(d) W alone, for B A sees another input."""
    if masked:
        return w if d is None else w * d[:, None]
    new = torch.addmm(w, u, a, alpha=s)
    return new if d is None else new.mul_(d[:, None])


def _rows(u: Tensor, d: Tensor | None) -> Tensor:
    return u if d is None else torch.mul(u, d[:, None], out=torch.empty_like(u))


def _stretched(y: Tensor, b: Tensor | None, d: Tensor | None) -> Tensor:
    """y + (d - 1) (y - b): exactly y where d is 1, and close to it without rounding d to the precision of y."""
    if d is None:
        return y
    more = y.clone() if b is None else y - b
    return y.add_(more.mul_(d - 1))


def _sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """sum_t a_ti b_ti in float32 or wider; einsum is twenty times slower here."""
    wide = torch.promote_types(a.dtype, torch.float32)
    total = torch.zeros(a.shape[1], dtype=wide, device=a.device)
    for x, y in zip(a.split(CHUNK), b.split(CHUNK), strict=True):
        total += (x * y).sum(0, dtype=wide)
    return total


class LowRankLinear(torch.autograd.Function):
    """Forward and backward by hand: four thin products in place of six, no temporaries of the output's size.

    x `[..., in]`, W `[out, in]` and b frozen, A `[r, in]`, B `[out, r]`, d `[out]` or None (ones); `cast` is
    autocast's dtype. x is kept as given, so that layers share it, and cast again; beside it A x, which is thin,
    where it was computed, and for a trained d also y. A frozen A needs no x. With p > 0 the low-rank path sees
    drop(x), whose mask is drawn again from its seed. Once differentiable: asking for more raises.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        A: Tensor,
        B: Tensor,
        d: Tensor | None,
        s: float,
        p: float,
        cast: torch.dtype | None,
    ) -> Tensor:
        flat, w, bias = x.reshape(-1, x.shape[-1]), W, b
        if cast is not None:
            flat, w, bias = flat.to(cast), W.to(cast), None if b is None else b.to(cast)
        a, u = A.to(flat.dtype), B.to(flat.dtype)
        ctx.wide, ctx.p, ctx.s = _wide(len(flat), w), p, s / (1.0 - p)
        ctx.shape = x.shape
        seed = new_seed(x.device) if p else None
        thin = p or not ctx.wide or not ctx.needs_input_grad[3]
        seen = flat if seed is None else blank(flat, dropped(seed, flat.numel(), p))
        h: Any = a @ seen.T if thin else None  # [r, tokens]: from two to four times as fast as its transpose
        if ctx.wide:
            y = F.linear(flat, _dense(w, a, u, d, ctx.s, p > 0), bias)
        else:
            y = _stretched(F.linear(flat, w, bias), bias, d)
        if p or not ctx.wide:
            y.addmm_(h.T, _rows(u, d).T, alpha=ctx.s)
        kept = (x if ctx.needs_input_grad[3] else None, h, y if ctx.needs_input_grad[5] else None)
        ctx.save_for_backward(*kept, W, b, A, B, d, seed)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True; once_differentiable stays silent where it is pruned
            raise RunError(
                "The fused low-rank product has no second derivative: attach with plain=True, or declare that "
                'the part needs "second_order".'
            )
        x, h, y, W, b, A, B, d, seed = ctx.saved_tensors
        to_x, _, _, to_a, to_b, to_d, *_ = ctx.needs_input_grad
        g = grad.reshape(-1, grad.shape[-1])
        a, u = A.to(g.dtype), B.to(g.dtype)
        where = None if seed is None else dropped(seed, len(g) * W.shape[1], ctx.p)
        gh = (_rows(u, d).T @ g.T).mul_(ctx.s)
        grad_x = grad_a = grad_b = grad_d = None
        if to_a:
            x = x.reshape(-1, x.shape[-1]).to(g.dtype)
            x = x if where is None else blank(x, where)
            grad_a = (gh @ x).to(A.dtype)
            h = a @ x.T if h is None else h
        if to_b:
            grad_b = (h @ g).mul_(ctx.s).T.to(B.dtype)
            grad_b = grad_b if d is None else grad_b * d[:, None]
        if to_d:
            total = _sum_of_products(g, y)
            total = total if b is None else total - g.sum(0, dtype=total.dtype) * b
            grad_d = torch.where(d == 0, 0.0, total / d)
        if to_x:
            grad_x = _to_input(ctx, g, gh, W.to(g.dtype), a, u, d, where).view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, grad_d, None, None, None


def _to_input(
    ctx: Any, g: Tensor, gh: Tensor, w: Tensor, a: Tensor, u: Tensor, d: Tensor | None, where: Tensor | None
) -> Tensor:
    """The gradient of x: of the dense product, or of W's and of the thin one's, the latter through the mask."""
    if ctx.wide:
        w = _dense(w, a, u, d, ctx.s, where is not None)
    elif d is not None:
        g = torch.mul(g, d, out=torch.empty_like(g))
    if where is None:
        return g @ w if ctx.wide else (g @ w).addmm_(gh.T, a)
    through, flat = room(g, len(g), a.shape[1])
    torch.mm(gh.T, a, out=through)
    flat.index_fill_(0, where, 0.0)
    return through.addmm_(g, w)


def low_rank_linear(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    A: Tensor,
    B: Tensor,
    s: float,
    p: float = 0.0,
    d: Tensor | None = None,
) -> Tensor:
    """y = diag(d) (W x + s B A drop_p(x)) + b with W and b frozen, d `[out]` (None: ones).

    A and B may be computed from other tensors, and d as well: gradients go on. Under autocast everything is
    computed in its dtype, else in that of x.
    """
    kind = x.device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return LowRankLinear.apply(x, W, b, A, B, d, s, p, cast)  # type: ignore[no-any-return,no-untyped-call]
