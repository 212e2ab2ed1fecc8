"""x -> x * mask / (1 - p): masks that are a function of a seed, so that nobody has to keep them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["blank", "drop", "dropped", "new_seed", "room"]


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


# splitmix64, a counter-based generator; torch has no unsigned 64-bit products.
STEP, FIRST, SECOND = (_signed(w) for w in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def new_seed(device: torch.device) -> Tensor:
    """One number from torch's global CPU generator, so that resumed and recomputed passes draw it again."""
    return torch.randint(2**63 - 1, ()).to(device)


def _words(seed: Tensor, count: int) -> Tensor:
    """`count` random 64-bit words, the same for the same seed."""
    z = torch.arange(count, device=seed.device).mul_(STEP).add_(seed)
    z.bitwise_xor_(z >> 30).mul_(FIRST)
    z.bitwise_xor_(z >> 27).mul_(SECOND)
    return z.bitwise_xor_((z >> 31).bitwise_and_(2**33 - 1))


def dropped(seed: Tensor, count: int, p: float) -> Tensor:
    """Which of `count` entries are dropped, each with probability p: increasing indices, then `count` as filling.

    The gaps between dropped entries are geometric, so that p numbers per entry are drawn and not one. Their number
    is fixed: as many as are needed but once in 10^15 masks.
    """
    most = int(count * p + 8 * math.sqrt(count * p * (1 - p)) + 8)
    draws = _words(seed, (most + 1) // 2).view(torch.int32).bitwise_and_(2**31 - 1)
    scale = 1 / math.log1p(-p)  # gap = 1 + floor(scale log u) with u = (draw + 1/2) / 2^31
    gaps = torch.add(draws, 0.5).log_().mul_(scale).add_(1 - scale * math.log(2**31)).to(torch.int64)
    gaps[0] -= 1
    return gaps.cumsum(0).clamp_(max=count)


def room(x: Tensor, *shape: int) -> tuple[Tensor, Tensor]:
    """An empty tensor like x of this shape, and its flat memory with one entry more: the filling's place."""
    flat = x.new_empty(math.prod(shape) + 1)
    return flat[:-1].view(shape), flat


def blank(x: Tensor, where: Tensor) -> Tensor:
    """A copy of x with zeros at the flat indices `where`."""
    copy, flat = room(x, *x.shape)
    copy.copy_(x)
    flat.index_fill_(0, where, 0.0)
    return copy


def drop(x: Tensor, p: float, training: bool) -> Tensor:
    """x * mask / (1 - p), differentiable; draws what the fused products draw."""
    if not training or not p:
        return x
    where = dropped(new_seed(x.device), x.numel(), p)
    flat = torch.cat([x.reshape(-1), x.new_zeros(1)])
    return flat.index_fill(0, where, 0.0)[:-1].view(x.shape) / (1.0 - p)
