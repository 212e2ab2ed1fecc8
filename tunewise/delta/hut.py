"""W' = W * (1 + s B A): every weight is scaled by its own factor."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from tunewise.core.delta import Delta

from .fused import changed_linear
from .own_start import OwnStart

__all__ = ["HUT"]


def _changed(W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    return torch.addcmul(W, W, B @ A, value=s)


class HUT(OwnStart):
    """W' = W * (1 + s B A), element by element, A `[rank, in]`, B `[out, rank]`, s = alpha / rank.

    A starts uniform, B at 0, so that W' = W at step 0; a weight of 0 stays 0, so sparsity is kept. W' is
    built once per pass, 2 rank out in multiply-adds whatever the number of tokens (for rank 1, W' x =
    W x + s b * W (a * x) would need a second product with W). The gradient of B is scaled by W. Trainable scalars:
    rank (in + out) per site. Source: HUT, arXiv 2409.13501, whose abstract alone is public here: that two low-rank
    matrices transform W element-wise is its, 1 + s B A is our reading.
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "experts")
    gives: ClassVar[frozenset[str]] = frozenset({"sizes"})
    order: ClassVar[str] = "multiply"
    output = Delta.output

    def weight(self, t: Any, W: Tensor) -> Tensor:
        return _changed(W, t.A, t.B, self.s)

    def product(self, t: Any, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return changed_linear(partial(_changed, s=self.s), x, W, b, t.A, t.B)
