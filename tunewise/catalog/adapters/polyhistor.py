"""Polyhistor: adapters of several tasks, written by two thin generators per site."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.polyhistor import PolyhistorAdapter


@method(
    "polyhistor",
    title="Polyhistor",
    arxiv="2210.03265",
    lr=(1e-4, 3e-4, 1e-3),
    unverified="No code was found: sizes, the start at 0 and the absence of biases are our own reading.",
)
def polyhistor(
    size: int = 8,
    inner: int = 2,
    tasks: int = 1,
    task: int = 0,
    embedding: int = 64,
    sites: str | list[str] = "attention | mlp",
) -> Recipe:
    """y' = y + W_up f(W_down y), W = (G_A z_task) (G_B z_task)."""
    part = PolyhistorAdapter(size=size, inner=inner, tasks=tasks, task=task, embedding=embedding, sites=sites)
    return Recipe(delta=part)
