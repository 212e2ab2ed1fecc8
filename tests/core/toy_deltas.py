"""Dense changes of a weight, written as a third party would: what tests of mixing, rows and quantized bases share."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from tunewise.core.delta import Delta, P
from tunewise.sites import Site

__all__ = ["Dense", "Started", "Stretch"]


class Dense(Delta):
    """W' = W + D, D dense: an additive change without a thin form."""

    sites: str | list[str] = "query"

    def tensors(self, site: Site) -> dict[str, P]:
        return {"D": P(torch.zeros(site.out_features or 0, site.in_features or 0))}

    def weight(self, t: Any, W: Tensor) -> Tensor:
        return W + t.D


class Stretch(Dense):
    """W' = W * (1 + D): its change depends on what it changes."""

    order: ClassVar[str] = "multiply"

    def weight(self, t: Any, W: Tensor) -> Tensor:
        return W * (1 + t.D)


class Started(Dense):
    """Its start takes a tenth of the base weight away."""

    def attached(self, adaptation: Any) -> None:
        for _, site, _ in adaptation.sites:
            adaptation.commit(site, -0.1 * site.module.weight)
