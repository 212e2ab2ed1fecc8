"""L = sum_i w_i l_i / sum_i u_i: the task's own loss."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from tunewise.core.part import Part
from tunewise.core.run import Run

__all__ = ["TaskLoss"]


class TaskLoss(Part):
    """L = sum_i l_i / units: per-row losses l_i over the supervised units (rows, answer tokens) of the whole
    step.

    Dividing by the units of the step, not of the micro-batch, makes accumulation exact. The per-row losses of
    the whole step are kept in `run.sample_losses` by sample id.
    """

    slot: ClassVar[str] = "objective"
    weight: float = 1.0

    def loss(self, run: Run, batch: Any, logits: Tensor, outputs: Any, units: float) -> Tensor:
        """The loss of one micro-batch, in float32."""
        per_row = run.task.losses(logits, batch)
        run.sample_losses.update(
            zip(batch.ids, (per_row.detach() / batch.units.clamp(min=1)).tolist(), strict=True)
        )
        return per_row.sum() / units
