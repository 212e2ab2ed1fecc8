"""F(x) = sum_i a_i x^i / (1 + |sum_j b_j x^j|): an activation that is learnt."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gelu_start", "rational"]

EVEN = (0.398503, 0.100785, 0.002854)
BELOW = (0.414835, 0.055737)
"""x erf(x / sqrt 2) / 2 = sum_i EVEN_i x^(2i) / (1 + sum_j BELOW_j x^(2j)), least squares up to 4, 5e-4 off up to 3."""


def gelu_start() -> tuple[Tensor, Tensor]:
    """a `[7]` (powers 0 to 6) and b `[5]` (powers 1 to 5) with F within 1e-3 of GELU on [-3, 3]."""
    (e2, e4, e6), (b2, b4) = EVEN, BELOW
    return torch.tensor([0, 0.5, e2, b2 / 2, e4, b4 / 2, e6]), torch.tensor([0, b2, 0, b4, 0])


def rational(x: Tensor, above: Tensor, below: Tensor) -> Tensor:
    """F(x), element-wise. Source: Pade activation units, arXiv 1907.06732; degrees as in IAPT."""
    top = above[-1]
    for a in above[:-1].flip(0):
        top = top * x + a
    bottom = below[-1]
    for b in below[:-1].flip(0):
        bottom = bottom * x + b
    return top / (1 + (bottom * x).abs())
