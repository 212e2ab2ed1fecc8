"""y = W' x + b and y = W x + b + path(x), each in one autograd function that keeps x and theta alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunewise.core.errors import RunError

__all__ = ["BesideLinear", "ChangedLinear", "beside_linear", "changed_linear", "kept_rows"]

Theta = Sequence[Tensor | None]


def _once() -> None:
    if torch.is_grad_enabled():
        raise RunError(
            "The fused product has no second derivative: attach with plain=True, or declare that the part needs "
            '"second_order".'
        )


def _leaves(theta: Theta, needs: Sequence[bool]) -> list[Any]:
    return [
        p.detach().requires_grad_() if n and p is not None else p for p, n in zip(theta, needs, strict=True)
    ]


def _pulled(y: Tensor, leaves: Sequence[Any], needs: Sequence[bool], g: Tensor) -> list[Tensor | None]:
    """The derivative of y at every leaf that needs one, in their order."""
    wanted = [p for p, n in zip(leaves, needs, strict=True) if n]
    found = iter(torch.autograd.grad(y, wanted, g) if wanted else ())
    return [next(found) if n else None for n in needs]


def _changed(change: Callable[..., Tensor], W: Tensor, theta: Theta) -> Tensor:
    """W' in the precision of theta, as the core builds it."""
    return change(W.to(next(p.dtype for p in theta if p is not None)), *theta)


def _change_times(change: Callable[..., Tensor], x: Tensor, W: Tensor, *theta: Tensor | None) -> Tensor:
    """(W' - W) x, also where W' is not W plus something."""
    wide = W.to(next(p.dtype for p in theta if p is not None))
    return F.linear(x, (change(wide, *theta) - wide).to(x.dtype))


class ChangedLinear(torch.autograd.Function):
    """W' x forward; W' built anew, W'^T g and G = g^T x backward, which the derivative of `change` takes from
    there.

    Three products in all. Between forward and backward neither W' nor anything on the way to it is kept.
    """

    @staticmethod
    def forward(
        ctx: Any, change: Callable[..., Tensor], x: Tensor, W: Tensor, b: Tensor | None, *theta: Tensor | None
    ) -> Tensor:
        ctx.change = change
        ctx.save_for_backward(x, W, *theta)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, _changed(change, W, theta).to(x.dtype), b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _once()
        x, W, *theta = ctx.saved_tensors
        needs = ctx.needs_input_grad[4:]
        leaves = _leaves(theta, needs)
        with torch.autocast(x.device.type, enabled=False):
            with torch.enable_grad():
                new = _changed(ctx.change, W, leaves)
            grad_x = grad @ new.detach().to(grad.dtype) if ctx.needs_input_grad[1] else None
            outer = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])
            return None, grad_x, None, None, *_pulled(new, leaves, needs, outer.to(new.dtype))


class BesideLinear(torch.autograd.Function):
    """W x + b + path(x) forward; W^T g and the derivative of the path, computed anew, backward."""

    @staticmethod
    def forward(
        ctx: Any, path: Callable[..., Tensor], x: Tensor, W: Tensor, b: Tensor | None, *theta: Tensor | None
    ) -> Tensor:
        ctx.path = path
        ctx.save_for_backward(x, W, *theta)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, W, b).add_(path(x, *theta))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _once()
        x, W, *theta = ctx.saved_tensors
        needs = [ctx.needs_input_grad[1], *ctx.needs_input_grad[4:]]
        leaves = _leaves([x, *theta], needs)
        with torch.autocast(x.device.type, enabled=False):
            with torch.enable_grad():
                beside = ctx.path(*leaves)
            grad_x, *rest = _pulled(beside, leaves, needs, grad)
            return None, None if grad_x is None else grad_x.add_(grad @ W), None, None, *rest


def _eager(x: Tensor, W: Tensor, b: Tensor | None) -> bool:
    """Where W or b is trained, and for compilers, which fuse by themselves."""
    return W.requires_grad or (b is not None and b.requires_grad) or torch.compiler.is_compiling()


def _autocast_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def changed_linear(
    change: Callable[..., Tensor], x: Tensor, W: Tensor, b: Tensor | None, *theta: Tensor | None
) -> Tensor:
    """y = change(W, *theta) x + b; x `[..., in]`, W `[out, in]`.

    `change` is a pure function of torch operations. One product for all tokens, for changes whose dense form
    is cheap beside it; in half precision two, since W' would round a small change away. Once differentiable.
    """
    dtype = _autocast_dtype(x)
    if dtype.itemsize < 4:
        return beside_linear(partial(_change_times, change), x, W, b, W, *theta)
    if _eager(x, W, b):
        return F.linear(x, _changed(change, W, theta).to(W.dtype), b)
    return ChangedLinear.apply(change, x.to(dtype), W, None if b is None else b.to(dtype), *theta)  # type: ignore[no-any-return,no-untyped-call]


def beside_linear(
    path: Callable[..., Tensor], x: Tensor, W: Tensor, b: Tensor | None, *theta: Tensor | None
) -> Tensor:
    """y = W x + b + path(x, *theta), for paths that are cheap beside W x.

    `path` is a pure function of torch operations that answers in the precision of x; what it computes on the way
    is not kept. Once differentiable.
    """
    dtype = _autocast_dtype(x)
    x, W, b = x.to(dtype), W.to(dtype), None if b is None else b.to(dtype)
    if _eager(x, W, b):
        return F.linear(x, W, b) + path(x, *theta)
    return BesideLinear.apply(path, x, W, b, *theta)  # type: ignore[no-any-return,no-untyped-call]


def kept_rows(
    t: Any, like: Tensor, rows: int, rank_dropout: float, module_dropout: float, scaled: bool = True
) -> Tensor | None:
    """`[rows, 1]`, what the rows of a change are multiplied by in training; None without dropout.

    A row is dropped with probability `rank_dropout` (with `scaled` the others grow by all / kept), the whole
    change with `module_dropout`. The names are those of LyCORIS and PEFT.
    """
    if not t.training or not (rank_dropout or module_dropout):
        return None
    keep = (torch.rand(rows, 1, device=like.device) >= rank_dropout).to(like.dtype)
    if scaled:
        keep = keep / keep.mean().clamp(min=1.0 / rows)
    return keep * (torch.rand((), device=like.device) >= module_dropout)
