"""W' = W + s B A, A = A_0 + sum_j alpha_j A_j / sqrt(k), B = sum_j beta_j B_j / sqrt(k)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from tunewise.core.delta import P
from tunewise.core.streams import seed_of
from tunewise.sites import Site

from .basis import mix_basis
from .own_start import OwnStart

__all__ = ["NOLA"]


class NOLA(OwnStart):
    """W' = W + s B A with A = A_0 + sum_j alpha_j A_j / sqrt(k), B = sum_j beta_j B_j / sqrt(k), k = `basis`.

    Trained are alpha `[k]` and beta `[k]`, which start at 0. A_j `[rank, in]` and B_j `[out, rank]` are uniform in
    (-1, 1), A_0 in (-1/sqrt(in), 1/sqrt(in)); all are drawn from seeds in the forward and again in the backward
    pass and never stored, so a checkpoint holds 2 k numbers and three seeds per site. The seeds come from `seed`
    and the site's name. Cost per pass: k rank (in + out) draws on the CPU, whatever the batch. s = alpha / rank.
    Trainable scalars: 2 k per site, whatever rank, in and out. Source: NOLA, arXiv 2310.02556 (its code draws on the
    model's device, where bases differ between devices).
    """

    gives: ClassVar[frozenset[str]] = frozenset({"components"})
    rank: PositiveInt = 8
    alpha: float = 8.0
    basis: PositiveInt = 512
    seed: NonNegativeInt = 0

    def start(self, site: Site) -> dict[str, P]:
        seeds = torch.tensor([seed_of(self.seed, site.name, name) for name in ("A_0", "A", "B")])
        return {
            "alpha": P(torch.zeros(self.basis), "mix"),
            "beta": P(torch.zeros(self.basis), "mix"),
            "seeds": P(seeds, trainable=False),
            "like": P(
                torch.empty(site.out_features or 0, site.in_features or 0, 0), trainable=False, saved=False
            ),
        }

    def trained(self, t: Any) -> tuple[Tensor, Tensor]:
        rows, columns, _ = t.like.shape  # a tensor without entries: sizes that compilers know
        start = mix_basis(t.alpha.new_ones(1), t.seeds[0], self.rank * columns) / columns**0.5
        A = start + mix_basis(t.alpha, t.seeds[1], self.rank * columns)
        B = mix_basis(t.beta, t.seeds[2], rows * self.rank)
        return A.view(self.rank, columns), B.view(rows, self.rank)

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        return 2 * self.basis
