"""Prompt tuning: learnt vectors before the input."""

from typing import Literal

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.prompt import SoftPrompt


@method("prompt_tuning", title="Prompt tuning", arxiv="2104.08691", lr=(1e-3, 1e-2, 1e-1))
def prompt_tuning(
    tokens: int = 16,
    keep: bool = False,
    place: Literal["front", "after_first"] = "front",
    text: str | None = None,
    ids: list[int] | None = None,
) -> Recipe:
    """f([P; E(x)]), P trained."""
    return Recipe(delta=SoftPrompt(tokens, keep, place, text, ids))
