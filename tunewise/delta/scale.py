"""y' = (1 + g) y: new scales on outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from tunewise.core.delta import Delta, P
from tunewise.sites import Site

__all__ = ["Scale"]


class Scale(Delta):
    """y' = (1 + g) * y, element-wise over the outputs of a linear layer (bias included), g `[out]` starting
    at 0.

    Mergeable: W' = diag(1 + g) W, b' = (1 + g) b. Trainable scalars: out per site.
    Source: SSF (scale of features), arXiv 2210.08823, without its shift, which bias tuning is.
    """

    linear: ClassVar[bool] = True
    unit: ClassVar[str] = "row"
    sites: str | list[str] = "linear"

    def tensors(self, site: Site) -> dict[str, P]:
        assert site.out_features is not None
        return {"g": P(torch.zeros(site.out_features), "scale")}

    def output(self, t: Any, x: Tensor, y: Tensor) -> Tensor:
        return y * (1 + t.g)

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        return site.out_features or 0
