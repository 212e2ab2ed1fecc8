"""Which entries of a weight are trained: smallest, largest, random, of the leading subspace, or outside of it."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from tunewise.core.errors import UserError
from tunewise.core.part import Part
from tunewise.init.svd import top_svd

__all__ = ["Below", "Decomposed", "Entries", "Largest", "Principal", "Uniform", "truncated"]

EXACT = 1024
"""Up to this smaller side a truncation comes from a full SVD, above from a randomised one."""
ITERATIONS = 4


class Entries(Part):
    """A selector: `pick` gives sorted positions in the flattened W `[out, in]`, `count` how many."""

    def pick(self, W: Tensor, generator: torch.Generator) -> Tensor:
        """The selected positions, int64 and sorted; random numbers come from `generator` (CPU) alone."""
        raise NotImplementedError

    def count(self, W: Tensor) -> int:
        """How many entries `pick` selects."""
        raise NotImplementedError


class Below(Entries):
    """|w| < threshold: the smallest weights. Source: SaRA, arXiv 2409.06633."""

    threshold: PositiveFloat = 2e-3

    def pick(self, W: Tensor, generator: torch.Generator) -> Tensor:
        return (W.reshape(-1).abs() < self.threshold).nonzero().view(-1)

    def count(self, W: Tensor) -> int:
        return int((W.abs() < self.threshold).sum())


class Budget(Entries):
    """k entries, at most all: `number` of them, a `share` of the weight, or rank (in + out), as many as LoRA has."""

    share: Annotated[float, Field(gt=0, le=1)] | None = None
    rank: PositiveInt | None = None
    number: PositiveInt | None = None

    def count(self, W: Tensor) -> int:
        given = [v is not None for v in (self.share, self.rank, self.number)]
        if sum(given) != 1:
            raise UserError(f"{type(self).__name__} needs exactly one of share, rank and number.")
        rows, columns = W.shape
        if self.rank is not None:
            return min(self.rank * (rows + columns), rows * columns)
        if self.share is not None:
            return max(round(self.share * rows * columns), 1)
        return min(self.number or 0, rows * columns)

    def largest(self, score: Tensor) -> Tensor:
        """The k positions of the largest scores."""
        return score.reshape(-1).topk(self.count(score)).indices.sort().values


class Uniform(Budget):
    """k entries drawn uniformly without replacement. Source: random masking, arXiv 2405.02596."""

    def pick(self, W: Tensor, generator: torch.Generator) -> Tensor:
        order = torch.randperm(W.numel(), generator=generator)
        return order[: self.count(W)].sort().values.to(W.device)


class Largest(Budget):
    """The k largest |w|."""

    def pick(self, W: Tensor, generator: torch.Generator) -> Tensor:
        return self.largest(W.abs())


class Principal(Budget):
    """The k largest |W_q|, W_q = the best approximation of W by rank `kept`. Source: LIFT, arXiv 2506.00772."""

    kept: PositiveInt = 128

    def pick(self, W: Tensor, generator: torch.Generator) -> Tensor:
        return self.largest(truncated(W, self.kept).abs())


class Decomposed(Budget):
    """The k largest |S| of W = U V + S + E, U V of growing rank, S sparse. Source: DSEE, arXiv 2111.00160.

    GreBsmo-style: V `[1, in]` at random, then at most `rounds` times: twice {U = QR((W - S) V^T).Q, V = U^T (W - S),
    S = W - U V without entries below `cut`}, and the first `grow` rows of R from QR(E) join V. Unlike the
    published code, which always makes 100 rounds, it ends once the k largest entries hold a smaller share of
    |S|^2 than a round before: from there on U V takes them in, and planted spikes are found no more.
    """

    rounds: PositiveInt = 100
    grow: PositiveInt = 5
    cut: PositiveFloat = 0.01

    def pick(self, W: Tensor, generator: torch.Generator) -> Tensor:
        V = torch.randn(1, W.shape[1], generator=generator).to(W)
        best, share = self.largest(W.abs()), 0.0
        for _ in range(self.rounds):
            U, V, S = self._fitted(W, V)
            found = self.largest(S.abs())
            now = float(S.reshape(-1)[found].square().sum() / S.square().sum().clamp(min=1e-30))
            if now < share or int(S.count_nonzero()) < len(found):
                break
            best, share = found, now
            if len(V) >= min(W.shape):
                break
            V = torch.cat([V, torch.linalg.qr(W - U @ V - S).R[: self.grow]])
        return best

    def _fitted(self, W: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        S = torch.zeros_like(W)
        for _ in range(2):
            U = torch.linalg.qr((W - S) @ V.T).Q
            V = U.T @ (W - S)
            S = W - U @ V
            S = torch.where(S.abs() < self.cut, 0.0, S)
        return U, V, S


def truncated(W: Tensor, rank: int) -> Tensor:
    """The best approximation of W `[out, in]` by `rank`; randomised where W is large.

    A rank that holds all of W gives W itself, bit by bit.
    """
    if rank >= min(W.shape):
        return W
    u, s, v = top_svd(W, rank, None if min(W.shape) <= EXACT else ITERATIONS)
    return (u * s) @ v
