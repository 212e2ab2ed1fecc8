"""W' = 1[R > tau] * W: a learnt mask that switches weights off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from tunewise.core.delta import Delta, P
from tunewise.init.base import site_weight
from tunewise.sites import Site

__all__ = ["ThresholdMask"]


class ThresholdMask(Delta):
    """W' = 1[R > tau] * W, R of W's shape starting at `start` > tau, so that step 0 is the base.

    Straight-through: dL/dR = dL/dW' * W, as if the mask were R itself. Biases are not masked. R is saved as
    numbers and not as one bit per weight, so that training can go on from it; merging needs no R.
    Trainable scalars: the weights of the site. Source: R-AMT, arXiv 2307.15049.
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "experts")
    order: ClassVar[str] = "mask"
    unit: ClassVar[str] = "entry"
    threshold: float = 5e-3
    start: float = 1e-2
    sites: str | list[str] = "attention"

    def tensors(self, site: Site) -> dict[str, P]:
        return {"R": P(torch.full_like(site_weight(site), self.start), "mask")}

    def weight(self, t: Any, W: Tensor) -> Tensor:
        hard = (t.R.detach() > self.threshold).to(W.dtype)
        return (hard + (t.R - t.R.detach()).to(W.dtype)) * W  # the bracket is exactly 0

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        return site.count * (site.in_features or 0) * (site.out_features or 0)
