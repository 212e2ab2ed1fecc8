"""Seeded starts: the same tensors for the same seed, whatever the global random state and the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["generator", "kaiming", "positions"]


def generator(seed: int) -> torch.Generator:
    """A generator of one's own, on the CPU: what it draws can be drawn again instead of being saved."""
    return torch.Generator(device="cpu").manual_seed(seed)


def kaiming(*shape: int, gain: float = 3.0**-0.5, make: torch.Generator | None = None) -> Tensor:
    """Uniform in +-gain sqrt(3 / n), n the last size of `shape`; float32 on the CPU.

    The default gain is that of torch's linear layers and of LoRA's A, +-1 / sqrt(n). Without `make` the
    global generator is used.
    """
    bound = math.sqrt(3.0) * (gain / math.sqrt(shape[-1]))
    return torch.empty(*shape, device="cpu").uniform_(-bound, bound, generator=make)


def positions(rows: int, columns: int, count: int, seed: int) -> Tensor:
    """`[2, count]` distinct places of a rows x columns matrix: the first of a seeded permutation of all of them."""
    order = torch.randperm(rows * columns, generator=generator(seed), device="cpu")[:count]
    return torch.stack([order // columns, order % columns])
