"""[x_1 .. x_at; new; x_at+1 ..]: positions put between others, and taken out again, row by row."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["after_first", "insert", "padding_first", "remove"]


def after_first(mask: Tensor | None, like: Tensor) -> Tensor:
    """How many positions stand before what comes behind the first real token, `[rows, 1]`: 1 + padding on the left."""
    if mask is None or mask.dim() != 2:
        return torch.ones(len(like), 1, dtype=torch.long, device=like.device)
    return mask.long().argmax(1, keepdim=True) + 1


def insert(x: Tensor, new: Tensor, at: Tensor | None) -> Tensor:
    """x `[rows, length, ...]` with new `[rows, count, ...]` behind the first `at` `[rows, 1]` positions (None: 0)."""
    both, count = torch.cat([new, x], 1), new.shape[1]
    if at is None:
        return both
    j = torch.arange(both.shape[1], device=x.device)
    order = torch.where(j < at, j + count, torch.where(j < at + count, j - at, j))
    return torch.take_along_dim(both, _like(order, both), 1)


def remove(x: Tensor, count: int, at: Tensor | None) -> Tensor:
    """x without the `count` positions that `insert` put there."""
    if at is None:
        return x[:, count:]
    i = torch.arange(x.shape[1] - count, device=x.device)
    return torch.take_along_dim(x, _like(torch.where(i < at, i, i + count), x), 1)


def padding_first(x: Tensor, mask: Tensor) -> Tensor:
    """x `[rows, length, ...]` with what stands behind each row's last real token (mask 1) moved to its front."""
    j = torch.arange(x.shape[1], device=x.device)
    behind = mask.flip(1).long().argmax(1, keepdim=True)
    return torch.take_along_dim(x, _like((j - behind) % x.shape[1], x), 1)


def _like(order: Tensor, x: Tensor) -> Tensor:
    return order.view(*order.shape, *(1 for _ in x.shape[2:]))
