"""sum_j |W_j|: columns of a wide read-out are pulled to zero as wholes."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor

from tunewise.core.errors import UserError
from tunewise.core.part import Part
from tunewise.core.run import Run
from tunewise.delta.vqt import VisualQueries

__all__ = ["ColumnNorm"]


class ColumnNorm(Part):
    """L = weight sum_j |W_j|_2 over the columns of the read-out of VisualQueries, so that few features stay.

    Raises `UserError` for a recipe without VisualQueries. Source: VQT, arXiv 2212.03220 (1e-4 there).
    """

    slot: ClassVar[str] = "objective"
    weight: Annotated[float, Field(ge=0)] = 1e-4

    def loss(self, run: Run, batch: Any, logits: Tensor, outputs: Any, units: float) -> Tensor:
        """The penalty, shared among the micro-batches of the step by their units."""
        found: list[Any] = [t for _, _, t in run.handle.sites if isinstance(t.part, VisualQueries)]
        if not found:
            raise UserError(
                "ColumnNorm pulls at the read-out of VisualQueries, which this recipe does not have."
            )
        total = sum(t.W.norm(dim=0).sum() for t in found)
        assert isinstance(total, Tensor)
        return total * (batch.units.sum() / units)
