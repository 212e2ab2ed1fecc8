"""A delta and a method of somebody else's, with all rights: W' = W * (1 + u v^T)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from tunewise.core.delta import Delta, P
from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.sites import Site


class OuterScale(Delta):
    """W' = W * (1 + u v^T), element-wise, u `[out]` at 0, v `[in]` at 1; in + out scalars per site."""

    order: ClassVar[str] = "multiply"
    sites: str | list[str] = "linear"

    def tensors(self, site: Site) -> dict[str, P]:
        u, v = torch.zeros(site.out_features or 0), torch.ones(site.in_features or 0)
        return {"u": P(u, "scale"), "v": P(v, "scale")}

    def weight(self, t: Any, W: Tensor) -> Tensor:
        return W * (1 + torch.outer(t.u, t.v))

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        return (site.in_features or 0) + (site.out_features or 0)


@method("outer_scale", title="Element-wise rank-1 scaling", lr=(1e-3, 1e-2, 1e-1))
def outer_scale(sites: str | list[str] = "linear") -> Recipe:
    """W' = W * (1 + u v^T)."""
    return Recipe(delta=OuterScale(sites))
