"""min_{W, b} sum_i loss(W h_i + b, y_i) + |W|^2 / (2 C): a linear head solved exactly on frozen features."""

from __future__ import annotations

from typing import ClassVar

from tunewise.core.errors import UserError
from tunewise.core.part import Part
from tunewise.core.run import Run
from tunewise.head.pooled import PooledHead
from tunewise.head.solve import CANDIDATES, solve

__all__ = ["FitHead"]


class FitHead(Part):
    """Logistic regression (ridge for numbers) on pooled features h_i of the frozen backbone, one pass over
    the rows (`tunewise.head.solve`). To train on from there: `ProbedHead`.

    Raises `UserError` when anything but a PooledHead is to be trained.
    """

    slot: ClassVar[str] = "loop"
    candidates: tuple[float, ...] = CANDIDATES

    def run(self, run: Run) -> None:
        """Fits the head and puts W and b in place."""
        heads = [(t.part, t) for _, _, t in run.handle.sites if type(t.part) is PooledHead]
        if len(heads) != 1 or run.recipe["delta"]:
            raise UserError(
                "FitHead solves a PooledHead on a frozen backbone: it takes no delta and no other head. "
                "To train on from the solution: ProbedHead()."
            )
        ((head, t),) = heads
        run.metrics["C"] = solve(run, head, t, self.candidates)
        run.fire("finish")
