"""W' = W + diag(b) B diag(d) A with A and B random, frozen and shared by all sites."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from tunewise.core.delta import Delta, P
from tunewise.sites import Site

from .fused import beside_linear, changed_linear
from .kernels import drop
from .random import generator, kaiming

__all__ = ["VeRA"]


def _changed(W: Tensor, d: Tensor, b: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return torch.addmm(W, b[:, None] * B, d[:, None] * A)


def _path(x: Tensor, d: Tensor, b: Tensor, A: Tensor, B: Tensor) -> Tensor:
    d, b, A, B = (p.to(x.dtype) for p in (d, b, A, B))
    return b * F.linear(d * F.linear(x, A), B)


def _thin_pays(tokens: int, rank: int, rows: int, columns: int) -> bool:
    """Three pairs of thin products over all tokens against g^T x and four products of W's size and this rank."""
    return 3 * tokens * rank * (rows + columns) < rows * columns * (tokens + 4 * rank)


class VeRA(Delta):
    """W' = W + diag(b) B diag(d) A, A `[rank, in]`, B `[out, rank]`; trainable d `[rank]` and b `[out]`.

    A and B are slices of one pair for all sites, of the largest in and out among them: uniform with variance
    2 / in and 2 / rank, drawn anew from `seed` instead of being saved (the draws of PEFT, whose checkpoints
    without projections can be read). d starts at `d_initial`, b at 0. With dropout the path sees drop(x), the
    base x. Trainable scalars: rank + out per site. Whether two thin products or the dense W' run is decided by
    their cost. Source: arXiv 2310.11454.
    """

    gives: ClassVar[frozenset[str]] = frozenset({"components"})
    rank: PositiveInt = 256
    d_initial: float = 0.1
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    seed: NonNegativeInt = 0
    sites: str | list[str] = "linear"

    def shared(self, sites: Sequence[Site]) -> dict[str, P]:
        make = generator(self.seed)
        a = kaiming(self.rank, max(s.in_features or 0 for s in sites), gain=2**0.5, make=make)
        b = kaiming(max(s.out_features or 0 for s in sites), self.rank, gain=2**0.5, make=make)
        return {"A": P(a, trainable=False, saved=False), "B": P(b, trainable=False, saved=False)}

    def tensors(self, site: Site) -> dict[str, P]:
        d = torch.full((self.rank,), self.d_initial)
        return {"d": P(d, "scale"), "b": P(torch.zeros(site.out_features or 0), "scale")}

    def _theta(self, t: Any, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        d, b = t.d, t.b
        return d, b, t.shared.A[:, :columns].to(d.device), t.shared.B[: len(b)].to(d.device)

    def weight(self, t: Any, W: Tensor) -> Tensor:
        return _changed(W, *self._theta(t, W.shape[1]))

    def output(self, t: Any, x: Tensor, y: Tensor) -> Tensor:
        x = drop(x, self.dropout, t.training).to(y.dtype)
        return y + _path(x, *self._theta(t, x.shape[-1]))

    def product(self, t: Any, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        if self.dropout and t.training:
            y = F.linear(x, W, b)
            return self.output(t.cast(y.dtype), x, y)
        theta = self._theta(t, W.shape[1])
        if _thin_pays(x.numel() // x.shape[-1], self.rank, *W.shape):
            return beside_linear(_path, x, W, b, *theta)
        return changed_linear(_changed, x, W, b, *theta)

    def components(self, t: Any) -> tuple[Tensor, Tensor]:
        """(diag(b) B, diag(d) A): their product is W' - W."""
        columns = t.root.weight.shape[0] if t.transposed else t.root.in_features
        d, b, A, B = self._theta(t, columns)
        return b[:, None] * B, d[:, None] * A

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        return self.rank + (site.out_features or 0)
