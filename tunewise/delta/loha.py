"""W' = W + s (w1_a w1_b) * (w2_a w2_b): the element-wise product of two low-rank matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from tunewise.core.delta import Delta, P
from tunewise.sites import Site

from .fused import changed_linear, kept_rows
from .random import kaiming

__all__ = ["LoHa"]


def _changed(
    W: Tensor, w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor, keep: Tensor | None, s: float
) -> Tensor:
    left = w1_a if keep is None else w1_a * keep
    return torch.addcmul(W, left @ w1_b, w2_a @ w2_b, value=s)


class LoHa(Delta):
    """W' = W + s (w1_a w1_b) * (w2_a w2_b), w_a `[out, rank]`, w_b `[rank, in]`, s = alpha / rank.

    The rank of the change reaches rank^2 for 2 rank (in + out) trainable scalars. w2_b starts at 0, the
    others uniform (+-1 / sqrt of their last size), so that W' = W at step 0. The product runs once, with W':
    two thin products and one element-wise pass build it, whatever the number of tokens.
    `rank_dropout` and `module_dropout`: see `kept_rows`. Source: FedPara, arXiv 2108.06098; LyCORIS, arXiv
    2309.14859. Not here: the Tucker form for convolutions.
    """

    gives: ClassVar[frozenset[str]] = frozenset({"components", "sizes"})
    rank: PositiveInt = 8
    alpha: float = 8.0
    rank_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    module_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    sites: str | list[str] = "linear"

    @property
    def s(self) -> float:
        """The factor of the change."""
        return self.alpha / self.rank

    def tensors(self, site: Site) -> dict[str, P]:
        rows, columns, rank = site.out_features or 0, site.in_features or 0, self.rank
        return {
            "w1_a": P(kaiming(rows, rank), "direction", 1),
            "w1_b": P(kaiming(rank, columns), "direction", 0),
            "w2_a": P(kaiming(rows, rank), "direction", 1),
            "w2_b": P(torch.zeros(rank, columns), "direction", 0),
        }

    def _theta(self, t: Any) -> tuple[Tensor | None, ...]:
        keep = kept_rows(t, t.w1_a, len(t.w1_a), self.rank_dropout, self.module_dropout)
        return t.w1_a, t.w1_b, t.w2_a, t.w2_b, keep

    def weight(self, t: Any, W: Tensor) -> Tensor:
        change: Callable[..., Tensor] = partial(_changed, s=self.s)
        return change(W, *self._theta(t))

    def product(self, t: Any, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return changed_linear(partial(_changed, s=self.s), x, W, b, *self._theta(t))

    def components(self, t: Any) -> tuple[Tensor, Tensor]:
        """Row-wise and column-wise Kronecker products, rank^2 wide: (s w1_a w2_a, w1_b w2_b)."""
        b = t.w1_a[:, :, None] * t.w2_a[:, None, :]
        a = t.w1_b[:, None, :] * t.w2_b[None, :, :]
        return self.s * b.flatten(1), a.flatten(0, 1)

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        return 2 * self.rank * ((site.in_features or 0) + (site.out_features or 0))
