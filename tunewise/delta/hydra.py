"""y = y_0 + s B A x + s D C y_0, y_0 = W x + b: a low-rank branch beside a layer and one behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt
from torch import Tensor

from tunewise.core.delta import Delta, P
from tunewise.core.errors import UserError
from tunewise.init.base import site_weight
from tunewise.sites import Site

from .kernels import drop
from .own_start import OwnStart
from .random import kaiming

__all__ = ["Hydra"]


class Hydra(OwnStart):
    """y = y_0 + s B A x + s D C y_0 with y_0 = W x + b; A `[rank, in]`, B `[out, rank]`, C `[sequential, out]`,
    D `[out, sequential]`.

    The parallel branch is LoRA; rank=0 leaves a linear adapter behind the layer, sequential=0 LoRA alone.
    s = alpha / rank (alpha / sequential without a parallel branch). A and C start uniform (+-1/sqrt(in),
    +-1/sqrt(out)), B and D at 0. Mergeable: W' = W + s (B A + D C W), b' = b + s D C b. With dropout both branches
    see dropped inputs. Trainable scalars: rank (in + out) + 2 sequential out per site. Source: Hydra, arXiv
    2309.06922, without the branches' optional biases.
    """

    linear: ClassVar[bool] = True
    gives: ClassVar[frozenset[str]] = frozenset({"components"})
    rank: NonNegativeInt = 4
    alpha: float = 4.0
    sequential: NonNegativeInt = 8
    sites: str | list[str] = "output | down"
    weight = Delta.weight
    product = Delta.product

    @property
    def s(self) -> float:
        width = self.rank or self.sequential
        return self.alpha / (width if self.scaling == "rank" else width**0.5)

    def start(self, site: Site) -> dict[str, P]:
        if not (self.rank or self.sequential):
            raise UserError("Hydra: rank=0 and sequential=0 leave no branch; give at least one of them.")
        rows = site.out_features or 0
        found = super().start(site) if self.rank else {}
        if self.sequential:
            found["C"] = P(kaiming(self.sequential, rows), "direction")
            found["D"] = P(torch.zeros(rows, self.sequential), "direction")
        return found

    def output(self, t: Any, x: Tensor, y: Tensor) -> Tensor:
        new = super().output(t, x, y) if self.rank else y
        if not self.sequential:
            return new
        return new + self.s * F.linear(F.linear(drop(y, self.dropout, t.training), t.C), t.D)

    def components(self, t: Any) -> tuple[Tensor, Tensor]:
        """(s [B, D], [A; C W]): their product is W' - W."""
        pairs = [(t.B, t.A)] if self.rank else []
        if self.sequential:
            place = Site(t.site_name, "linear", "linear", t.root, transposed=t.transposed, rows=t.rows)
            pairs.append((t.D, t.C @ site_weight(place).to(t.C)))
        return self.s * torch.cat([b for b, _ in pairs], 1), torch.cat([a for _, a in pairs])

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        rows, columns = site.out_features or 0, site.in_features or 0
        return self.rank * (rows + columns) + 2 * self.sequential * rows
