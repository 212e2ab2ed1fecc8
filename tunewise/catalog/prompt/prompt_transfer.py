"""Prompt transfer: from a source task's prompt, as the start or as a teacher (PANDA)."""

from typing import Literal

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.prefix import Prefix
from tunewise.init.saved import FromSaved
from tunewise.objective.distillation import Distillation
from tunewise.objective.task_loss import TaskLoss


@method("prompt_transfer", title="Prompt transfer (PANDA)", arxiv="2208.10160", lr=(1e-3, 7e-3, 5e-2))
def prompt_transfer(
    source: str | None = None,
    mode: Literal["teacher", "start"] = "teacher",
    tokens: int = 20,
    weight: float = 0.01,
    schedule: Literal["constant", "ramp"] = "constant",
    sites: str | list[str] = "attention",
) -> Recipe:
    """L = CE + weight mean (z - z_T)^2, z_T the answers with the source task's prefix and head; or P starts there.

    mode="start" is vanilla transfer (SPoT). Without a source it is prefix tuning. Which source may help:
    `tunewise.init.saved.similarity`.
    """
    prefix = Prefix(tokens, sites)
    if mode == "start":
        return Recipe(delta=[prefix, FromSaved(source)] if source else prefix)
    return Recipe(delta=prefix, objective=[TaskLoss(), Distillation(source, weight, schedule)])
