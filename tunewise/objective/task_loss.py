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
        return self._sum(run, batch, run.task.losses(logits, batch), units)

    def direct(self, run: Run, batch: Any, units: float) -> Tensor | None:
        """The same from hidden states, where the head gives them and the task reads them: no table of logits.

        None where the plain way must be taken.
        """
        states = getattr(run.recipe.single("head"), "states", None)
        losses = getattr(run.task, "state_losses", None)
        if states is None or losses is None or type(self).loss is not TaskLoss.loss:
            return None
        found = states(run, batch) if run.task.reads_states else None
        return None if found is None else self._sum(run, batch, losses(*found, batch), units)

    def _sum(self, run: Run, batch: Any, per_row: Tensor, units: float) -> Tensor:
        run.sample_losses.update(
            zip(batch.ids, (per_row.detach() / batch.units.clamp(min=1)).tolist(), strict=True)
        )
        return per_row.sum() / units
