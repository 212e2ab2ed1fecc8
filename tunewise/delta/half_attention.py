"""softmax(s q k^T + m) v in half precision on a CPU: three plain products, where torch's fused backward is slow."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tunewise.core.errors import RunError

if TYPE_CHECKING:
    from tunewise.core.run import Run

__all__ = ["HalfAttention", "PlainAttention", "half_attention"]

LONGEST = 1024
"""Keys; beyond, rows x heads x queries x keys would be large beside everything else."""


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None, s: float, causal: bool) -> Tensor:
    scores = torch.matmul(q * s, k.transpose(-1, -2))
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is None:
        return scores.softmax(-1)
    if mask.dtype != torch.bool:
        return scores.add_(mask).softmax(-1)
    p = scores.masked_fill_(~mask, torch.finfo(q.dtype).min).softmax(-1)
    empty = ~mask.any(-1, keepdim=True)  # rows that see nothing give 0, as the fused function has it
    return p.masked_fill_(empty, 0.0) if bool(empty.any()) else p


class PlainAttention(torch.autograd.Function):
    """o = p v, p = softmax(s q k^T + m), keeping q, k and v; p is computed again in the backward pass.

    dv = p^T g, dp = g v^T, dz = p (dp - sum(p dp)), dq = s dz k, dk = s dz^T q. q `[..., queries, size]`, k and v
    `[..., keys, size]`, m as `scaled_dot_product_attention` takes it, without a gradient. Once differentiable.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, s: float, causal: bool
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        ctx.s, ctx.causal = s, causal
        return torch.matmul(_probabilities(q, k, mask, s, causal), v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RunError("Plain attention has no second derivative: attach with plain=True.")
        q, k, v, mask = ctx.saved_tensors
        p = _probabilities(q, k, mask, ctx.s, ctx.causal)
        grad_v = torch.matmul(p.transpose(-1, -2), grad)
        dz = torch.matmul(grad, v.transpose(-1, -2))
        inner = (p * dz).sum(-1, keepdim=True)
        dz = dz.sub_(inner).mul_(p).mul_(ctx.s)
        return torch.matmul(dz, k), torch.matmul(dz.transpose(-1, -2), q), grad_v, None, None, None


class HalfAttention(TorchFunctionMode):
    """Inside, `scaled_dot_product_attention` in half precision on a CPU that needs gradients is `PlainAttention`.

    Everything else stays torch's: float32, dropout, a mask that is trained, no gradient, and more than 1,024 keys.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return _attend(*args, **kwargs)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    half = query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16)
    fixed = attn_mask is None or not attn_mask.requires_grad
    if not (trained and half and fixed) or dropout_p or key.shape[-2] > LONGEST:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    s = query.shape[-1] ** -0.5 if scale is None else scale
    if enable_gqa and query.shape[-3] != key.shape[-3]:
        return _grouped(query, key, value, attn_mask, s, is_causal)
    return PlainAttention.apply(query, key, value, attn_mask, s, is_causal)  # type: ignore[no-any-return,no-untyped-call]


def _grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, s: float, causal: bool) -> Tensor:
    """Query heads that share keys stand below each other, as more queries of one head."""
    heads, length = k.shape[-3], q.shape[-2]
    group = q.shape[-3] // heads
    if causal:
        mask = torch.ones(length, k.shape[-2], dtype=torch.bool, device=q.device).tril()
    if mask is not None and mask.dim() > 2 and mask.shape[-3] != 1:
        mask = mask.expand(*mask.shape[:-2], length, -1).reshape(*mask.shape[:-3], heads, group * length, -1)
    elif mask is not None:
        mask = mask.expand(*mask.shape[:-2], length, -1).repeat(*[1] * (mask.dim() - 2), group, 1)
    below = q.reshape(*q.shape[:-3], heads, group * length, -1)
    y: Tensor = PlainAttention.apply(below, k, v, mask, s, False)  # type: ignore[no-untyped-call]
    return y.reshape(*q.shape[:-1], -1)


def half_attention(run: Run) -> AbstractContextManager[Any]:
    """`HalfAttention` for the time of a run on a CPU in half precision."""
    half = run.settings.dtype != "float32" or next(run.model.parameters()).dtype.itemsize < 4
    return HalfAttention() if half and run.device.type == "cpu" and not run.handle.plain else nullcontext()
