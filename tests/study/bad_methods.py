"""Methods of a user's own file, one for each way to go wrong."""

from __future__ import annotations

import time
from typing import Any, ClassVar

import torch

from tunewise.core.errors import RunError
from tunewise.core.method import method
from tunewise.core.part import Part
from tunewise.core.recipe import Recipe
from tunewise.delta.lora import LoRA


class Trap(Part):
    """Goes wrong in its third step."""

    slot: ClassVar[str] = "objective"
    how: str = "raise"
    weight: float = 1.0

    def loss(self, run: Any, batch: Any, logits: Any, outputs: Any, units: float) -> Any:
        from tunewise.objective.task_loss import TaskLoss

        value = TaskLoss().loss(run, batch, logits, outputs, units)
        if run.step < 2:
            return value
        if self.how == "nan":
            return value * float("nan")
        if self.how == "raise":
            raise RunError("The trap was stepped on.")
        if self.how == "hang":
            time.sleep(3600)
        KEPT.append(torch.ones(2**26))
        return value


KEPT: list[Any] = []


def _trap(how: str) -> Recipe:
    return Recipe(delta=LoRA(2), objective=Trap(how=how))


@method("nan", lr=(1e-4, 1e-3, 1e-2))
def nan() -> Recipe:
    """The loss becomes NaN."""
    return _trap("nan")


@method("hang", lr=(1e-4, 1e-3, 1e-2))
def hang() -> Recipe:
    """Sleeps."""
    return _trap("hang")


@method("grow", lr=(1e-4, 1e-3, 1e-2))
def grow() -> Recipe:
    """Takes 256 MiB more in every forward pass."""
    return _trap("grow")


@method("fall", lr=(1e-4, 1e-3, 1e-2))
def fall() -> Recipe:
    """Raises."""
    return _trap("raise")
