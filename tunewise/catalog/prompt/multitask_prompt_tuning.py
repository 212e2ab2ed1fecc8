"""Multitask prompt tuning: one prompt for all tasks, times a low-rank matrix of each."""

from typing import Literal

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.multitask_prompt import MultitaskPrompt


@method("multitask_prompt_tuning", title="Multitask prompt tuning", arxiv="2303.02861", lr=(1e-3, 1e-2, 1e-1))
def multitask_prompt_tuning(
    tokens: int = 16,
    tasks: int = 1,
    rank: int = 1,
    task: int = 0,
    source: str | None = None,
    take: Literal["average", "task", "shared"] = "average",
    source_task: int = 0,
) -> Recipe:
    """f([P_k; E(x)]), P_k = P * (U_k V_k) for task k, all trained."""
    made = MultitaskPrompt(
        tokens, tasks=tasks, rank=rank, task=task, source=source, take=take, source_task=source_task
    )
    return Recipe(delta=made)
