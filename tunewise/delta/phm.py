"""H = sum_i A_i (kron) B_i, B_i = s_i t_i: parameterised hypercomplex multiplication, and adapters made of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from tunewise.core.delta import P
from tunewise.core.errors import UserError
from tunewise.sites import Site

from .adapter import Bottleneck, Function, Weights, ends

__all__ = ["CompacterAdapter", "phm"]


def phm(A: Tensor, B: Tensor) -> Tensor:
    """sum_i A_i (kron) B_i, `[n p, n q]`, of A `[n, n, n]` and B `[n, p, q]`; every B_i may be a product s_i t_i."""
    n, (_, p, q) = len(A), B.shape
    return torch.einsum("nab,nij->aibj", A, B).reshape(n * p, n * q)


class CompacterAdapter(Bottleneck):
    """y' = y + H_up^T f(H_down^T y + b_down) + b_up, H = sum_{i <= n} A_i (kron) s_i t_i.

    A `[n, n, n]` is one tensor for all layers and both projections; s_i `[in / n, rank]` and t_i `[rank, out / n]`
    belong to each of them. rank=None leaves B_i `[in / n, out / n]` whole (a PHM adapter). The bottleneck is width /
    `reduction`, rounded up to a multiple of n. A starts as N(0, `spread`), s and t Xavier-uniform with gain sqrt(2),
    biases at 0, as the authors do it: step 0 differs from the base by terms of the order spread^2. With `zero` t_i of
    H_up (or its B_i) start at 0 and step 0 is the base. Trainable scalars: n^3 once, and 2 rank (width + size) + width
    + size per site. Raises `UserError` for a width that n does not divide. Source: arXiv 2106.04647.
    """

    size: PositiveInt | None = None  # type: ignore[assignment]
    reduction: PositiveInt = 32
    n: PositiveInt = 4
    rank: PositiveInt | None = 1
    function: Function = "gelu_new"
    spread: Annotated[float, Field(gt=0)] = 1e-4
    zero: bool = False
    sites: str | list[str] = "attention | mlp"

    @property
    def identity(self) -> bool:  # type: ignore[override]
        """Whether step 0 is the base, exactly."""
        return self.zero

    def shared(self, sites: Sequence[Site]) -> dict[str, P]:
        return {"A": P(torch.randn(self.n, self.n, self.n) * self.spread, "weight")}

    def width(self, site: Site) -> tuple[int, int]:
        """(width, size of the bottleneck) at a site."""
        width, _ = ends(site, self.reads)
        size = self.size or -(-max(width // self.reduction, 1) // self.n) * self.n
        for what, value in (("width", width), ("bottleneck", size)):
            if value % self.n:
                raise UserError(f"The {what} of {site.name}, {value}, is not divisible by n={self.n}.")
        return width, size

    def tensors(self, site: Site) -> dict[str, P]:
        width, size = self.width(site)
        down, up = self._factors("down", width, size), self._factors("up", size, width)
        if self.zero:
            last = list(up)[-1]
            up[last] = P(torch.zeros_like(up[last].value), "direction")
        biases = {"down_bias": P(torch.zeros(size), "bias"), "up_bias": P(torch.zeros(width), "bias")}
        return down | up | biases | self.factor()

    def _factors(self, name: str, ins: int, outs: int) -> dict[str, P]:
        rows, columns = ins // self.n, outs // self.n
        if self.rank is None:
            return {f"{name}_B": P(self._xavier(rows, columns), "direction")}
        s, t = self._xavier(rows, self.rank), self._xavier(self.rank, columns)
        return {f"{name}_s": P(s, "direction"), f"{name}_t": P(t, "direction")}

    def _xavier(self, rows: int, columns: int) -> Tensor:
        bound = (2 * 6 / (rows + columns)) ** 0.5
        return torch.empty(self.n, rows, columns).uniform_(-bound, bound)

    def weights(self, t: Any) -> Weights:
        found = []
        for name in ("down", "up"):
            whole = self.rank is None
            B = getattr(t, f"{name}_B") if whole else getattr(t, f"{name}_s") @ getattr(t, f"{name}_t")
            found.append(phm(t.shared.A, B).T)
        return Weights(found[0], found[1], t.down_bias, t.up_bias)

    def output(self, t: Any, x: Tensor, y: Tensor) -> Tensor:
        return y + self.adapt(t, y)

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        width, size = self.width(site)
        factors = width * size // self.n if self.rank is None else self.rank * (width + size)
        return 2 * factors + width + size + (self.scale == "learned")
