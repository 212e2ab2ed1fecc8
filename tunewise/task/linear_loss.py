"""l_t = -log softmax(W h_t + b)_{y_t}: token losses from hidden states, without a table of all logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunewise.core.errors import RunError

__all__ = ["LinearCrossEntropy", "linear_cross_entropy"]

ENTRIES = 2**23
"""Of the table of logits that exist at once."""


class LinearCrossEntropy(torch.autograd.Function):
    """Some positions at a time: their logits, losses, and the gradient of their h, made in the forward pass.

    h `[positions, width]`, W `[words, width]` and b frozen, y `[positions]`. Keeps only the gradient of h, in the
    precision of h. Once differentiable: asking for more raises.
    """

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, W: Tensor, b: Tensor | None, y: Tensor, cast: torch.dtype | None
    ) -> Tensor:
        if cast is not None:
            W, b = W.to(cast), None if b is None else b.to(cast)
        wanted = ctx.needs_input_grad[0]
        losses = torch.empty(len(h), dtype=torch.promote_types(h.dtype, torch.float32), device=h.device)
        grad = torch.empty_like(h) if wanted else None
        size = max(1, ENTRIES // len(W))
        for start in range(0, len(h), size):
            at = slice(start, start + size)
            z = F.linear(h[at].to(W.dtype), W, b).to(losses.dtype)
            highest = z.amax(1, keepdim=True)
            right = z.gather(1, y[at, None])
            total = z.sub_(highest).exp_().sum(1, keepdim=True)
            losses[at] = (total.log() + highest - right)[:, 0]
            if grad is not None:
                # softmax W - W_y, with the division and the difference where there are few numbers
                grad[at] = (z.to(W.dtype) @ W).to(losses.dtype).div_(total).sub_(W[y[at]])
        ctx.save_for_backward(grad)
        return losses

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RunError(
                "The loss from hidden states has no second derivative: attach with plain=True, or declare that "
                'the part needs "second_order".'
            )
        (grad,) = ctx.saved_tensors
        return torch.mul(grad, g[:, None], out=torch.empty_like(grad)), None, None, None, None


def linear_cross_entropy(h: Tensor, W: Tensor, b: Tensor | None, y: Tensor) -> Tensor:
    """Losses `[positions]` in float32 of the words y under softmax(W h + b); the plain form where W is trained.

    Under autocast the logits are computed in its dtype, as a linear layer's are.
    """
    if W.requires_grad or (b is not None and b.requires_grad):
        return F.cross_entropy(F.linear(h, W, b).float(), y, reduction="none")
    kind = h.device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return LinearCrossEntropy.apply(h, W, b, y, cast)  # type: ignore[no-any-return,no-untyped-call]
