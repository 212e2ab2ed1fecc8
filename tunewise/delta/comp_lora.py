"""W' = W + s (I - U U^T) B A (I - V V^T): a low-rank change outside of W's leading singular directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor

from tunewise.core.delta import P
from tunewise.core.errors import UserError
from tunewise.init.base import site_weight
from tunewise.sites import Site

from .own_start import OwnStart

__all__ = ["CompLoRA", "leading_directions"]


def leading_directions(W: Tensor, energy: float, count: int | None) -> tuple[Tensor, Tensor]:
    """(U `[out, k]`, V `[in, k]`): the first singular vectors of W, which hold `energy` of the sum of squared
    singular values, or `count` of them; at least one direction is left out.
    """
    u, s, vh = torch.linalg.svd(W, full_matrices=False)
    share = s.square().cumsum(0) / s.square().sum().clamp(min=torch.finfo(s.dtype).tiny)
    k = count if count is not None else int((share < energy).sum()) + (energy > 0)
    k = min(k, len(s) - 1)
    return u[:, :k], vh[:k].T


class CompLoRA(OwnStart):
    """W' = W + s (I - U U^T) B A (I - V V^T), U `[out, k]` and V `[in, k]` the first k singular vectors of W.

    A `[rank, in]`, B `[out, rank]` as in LoRA; U and V are frozen and saved. U^T dW = 0 and dW V = 0 always, so the
    leading part of W is untouched. k is the smallest number of directions with `energy` of W's squared singular
    values, or `directions`; k = 0 is LoRA. The projections are folded into A and B: rank k (in + out)
    multiply-adds per forward pass, whatever the number of tokens. Costs one singular value decomposition per site
    when attached. Trainable scalars: rank (in + out) per site.

    Source: Comp-LoRA, arXiv 2501.15040. The publication writes dW = U_c B A V_c^T with bases U_c, V_c of the
    complements, (in + out) times as many frozen numbers as directions left; the projectors span the same changes
    with those of the directions kept, and agree with it up to a rotation of A and B. How k is chosen is not public.
    """

    gives: ClassVar[frozenset[str]] = frozenset({"components", "sizes"})
    energy: Annotated[float, Field(ge=0, lt=1)] = 0.5
    directions: NonNegativeInt | None = None

    def start(self, site: Site) -> dict[str, P]:
        rows, columns = site.out_features or 0, site.in_features or 0
        if self.directions is not None and self.directions >= min(rows, columns):
            raise UserError(
                f"CompLoRA: directions={self.directions} leaves none of the {min(rows, columns)} of {site.name}."
            )
        return {
            **super().start(site),
            "U": P(torch.zeros(rows, 0), trainable=False),
            "V": P(torch.zeros(columns, 0), trainable=False),
        }

    def attached(self, adaptation: Any) -> None:
        for _, site, t in adaptation.sites:
            if t.part is self and not t.A.is_meta:  # a model without values is only counted
                u, v = leading_directions(site_weight(site), self.energy, self.directions)
                t.U, t.V = u.to(t.A).contiguous(), v.to(t.A).contiguous()

    def trained(self, t: Any) -> tuple[Tensor, Tensor]:
        return t.A - (t.A @ t.V) @ t.V.T, t.B - t.U @ (t.U.T @ t.B)

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        return self.rank * ((site.in_features or 0) + (site.out_features or 0))
