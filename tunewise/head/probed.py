"""A linear head on pooled states that starts where a linear probe ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunewise.core.errors import UserError

from .pooled import PooledHead
from .solve import solve

if TYPE_CHECKING:
    from tunewise.core.run import Run

__all__ = ["ProbedHead"]


class ProbedHead(PooledHead):
    """logits = W pool(h) + b, W and b solved exactly on the training rows when training begins, then trained on.

    The rows' states are read in one pass, with all deltas as they start (`tunewise.head.solve`); a first step from
    there does not tear good features apart. Source: LP-FT, arXiv 2202.10054. Raises `UserError` in a loop that was
    given no rows, and as `PooledHead`.
    """

    def prepare(self, run: Run) -> None:
        if run.task is None or "train" not in run.streams.data:
            raise UserError("ProbedHead is solved on the training rows: train with tune.")
        solve(run, self, next(t for _, _, t in run.handle.sites if t.part is self))
