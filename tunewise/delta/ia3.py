"""x' = (1 + g) x: new scales on inputs; with `Scale` on outputs it makes IA3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from tunewise.core.delta import Delta, P
from tunewise.core.errors import UserError
from tunewise.sites import Site

__all__ = ["InputScale"]


class InputScale(Delta):
    """x' = (1 + g) * x, element-wise over what a linear layer reads, g `[in]` starting at 0.

    Mergeable: W' = W diag(1 + g). Trainable scalars: in per site. PEFT's `ia3_l` is 1 + g.
    Raises `UserError` for some rows of a fused layer: all rows read one input.
    Source: IA3 (l_ff), arXiv 2205.05638.
    """

    linear: ClassVar[bool] = True
    unit: ClassVar[str] = "column"
    sites: str | list[str] = "down"

    def tensors(self, site: Site) -> dict[str, P]:
        if site.rows is not None:
            raise UserError(
                f"InputScale scales what the whole of {site.name} reads; {site.role} is only a part of its rows."
            )
        return {"g": P(torch.zeros(site.in_features or 0), "scale")}

    def input(self, t: Any, x: Tensor) -> Tensor:
        return x * (1 + t.g)

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        return site.in_features or 0
