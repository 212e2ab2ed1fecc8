"""W' = W + s kron(w1, w2): the Kronecker product of two small matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from tunewise.core.delta import Delta, P
from tunewise.core.errors import UserError
from tunewise.sites import Site

from .fused import beside_linear, changed_linear, kept_rows
from .random import kaiming

__all__ = ["LoKr", "factors"]


def factors(size: int, factor: int = -1) -> tuple[int, int]:
    """(m, n) with m n = size and m <= n: as near to each other as m <= factor allows; -1 sets no bound.

    A `factor` that divides `size` is taken as it is, also when it is the larger one: (factor, size / factor).
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    root = math.isqrt(size)
    bound = min(root, factor) if factor > 0 else root
    small = next(m for m in range(bound, 0, -1) if size % m == 0)
    return small, size // small


def _changed(W: Tensor, w1: Tensor, w2: Tensor, keep: Tensor | None, s: float) -> Tensor:
    (p, a), (q, b) = w1.shape, w2.shape
    grid = torch.outer(w1.flatten(), w2.flatten()).view(p, a, q, b).transpose(1, 2)
    grid = grid if keep is None else grid * keep.view(p, q, 1, 1)
    return torch.add(W.unflatten(0, (p, q)).unflatten(2, (a, b)), grid, alpha=s).reshape(W.shape)


def _path(x: Tensor, w1: Tensor, w2: Tensor, keep: Tensor | None, s: float) -> Tensor:
    """s kron(w1, w2) x without the Kronecker product: s w1 X w2^T with x as a matrix X `[a, b]`."""
    (p, a), (q, b) = w1.shape, w2.shape
    grid = x.unflatten(-1, (a, b))
    w1, w2 = w1.to(x.dtype), w2.to(x.dtype)
    right_first = a * q * (b + p) <= p * b * (a + q)
    y = w1 @ (grid @ w2.T) if right_first else (w1 @ grid) @ w2.T
    y = (s * y).flatten(-2)
    return y if keep is None else y * keep.T[0].to(x.dtype)


class LoKr(Delta):
    """W' = W + s kron(w1, w2), w1 `[p, a]`, w2 `[q, b]`, p q = out, a b = in, s = alpha / rank.

    (p, q) and (a, b) are the `factors` of out and in. w2 = w2_a w2_b `[q, rank] [rank, b]` where rank is less
    than half of its larger side, with `decompose_both` w1 likewise; else they are whole. At step 0 w1 (or w1_a)
    is 0, with start="lycoris" w2 (or w2_b); the others are uniform (+-1 / sqrt of their last size).

    Per token two small products cost a q (b + p) or p b (a + q); they run at about a twelfth of the speed of
    a large one. The dense W' costs one more product (g^T x) and passes over W that are worth 256 tokens. The
    cheaper one is taken (measured with widths 384 to 2048). `rank_dropout`, `rank_dropout_scale` and
    `module_dropout`: see `kept_rows`. Source: LyCORIS, arXiv 2309.14859, after KronA, arXiv 2212.10650.
    Not here: the Tucker form for convolutions.
    """

    rank: PositiveInt = 8
    alpha: float = 8.0
    factor: int = -1
    decompose_both: bool = False
    start: Literal["w1", "lycoris"] = "w1"
    rank_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rank_dropout_scale: bool = False
    module_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    sites: str | list[str] = "linear"

    @property
    def s(self) -> float:
        """The factor of the Kronecker product."""
        return self.alpha / self.rank

    def _shapes(self, site: Site) -> tuple[tuple[int, int], tuple[int, int], bool, bool]:
        """(w1, w2, w1 is whole, w2 is whole)."""
        if self.factor == 0 or self.factor < -1:
            raise UserError(f"LoKr: factor={self.factor} is no size; give -1 or a positive number.")
        (p, q), (a, b) = (factors(n or 1, self.factor) for n in (site.out_features, site.in_features))
        whole = not (self.decompose_both and self.rank < max(p, a) / 2)
        return (p, a), (q, b), whole, self.rank >= max(q, b) / 2

    def tensors(self, site: Site) -> dict[str, P]:
        first, second, whole1, whole2 = self._shapes(site)
        found = {}
        for name, (rows, columns), whole, zero in (
            ("w1", first, whole1, self.start == "w1"),
            ("w2", second, whole2, self.start == "lycoris"),
        ):
            if whole:
                found[name] = torch.zeros(rows, columns) if zero else kaiming(rows, columns)
                continue
            a, b = kaiming(rows, self.rank), kaiming(self.rank, columns)
            vanishing = {"w1": a, "w2": b}[name]
            found |= {f"{name}_a": a, f"{name}_b": b}
            if zero:
                vanishing.zero_()
        return {name: P(value, "direction") for name, value in found.items()}

    def _theta(self, t: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        w1 = t.w1 if "w1" in t.meta else t.w1_a @ t.w1_b
        w2 = t.w2 if "w2" in t.meta else t.w2_a @ t.w2_b
        keep = kept_rows(
            t, w1, len(w1) * len(w2), self.rank_dropout, self.module_dropout, self.rank_dropout_scale
        )
        return w1, w2, keep

    def weight(self, t: Any, W: Tensor) -> Tensor:
        return _changed(W, *self._theta(t), s=self.s)

    def output(self, t: Any, x: Tensor, y: Tensor) -> Tensor:
        return y + _path(x.to(y.dtype), *self._theta(t), s=self.s)

    def product(self, t: Any, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        theta = self._theta(t)
        tokens = x.numel() // x.shape[-1]
        if _thin_pays(tokens, theta[0].shape, theta[1].shape):
            return beside_linear(partial(_path, s=self.s), x, W, b, *theta)
        return changed_linear(partial(_changed, s=self.s), x, W, b, *theta)

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        first, second, whole1, whole2 = self._shapes(site)
        count = first[0] * first[1] if whole1 else self.rank * sum(first)
        return count + (second[0] * second[1] if whole2 else self.rank * sum(second))


def _thin_pays(tokens: int, first: Sequence[int], second: Sequence[int]) -> bool:
    (p, a), (q, b) = first, second
    thin = min(a * q * (b + p), p * b * (a + q))
    return 12 * tokens * thin < (tokens + 256) * p * q * a * b
