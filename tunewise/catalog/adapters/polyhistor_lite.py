"""Polyhistor-Lite: one written template for all sites, scaled to each by a small Kronecker factor."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.polyhistor import PolyhistorLite


@method(
    "polyhistor_lite",
    title="Polyhistor-Lite",
    arxiv="2210.03265",
    lr=(3e-4, 1e-3, 2e-3),
    unverified="No code was found: one template for all blocks, the start of K and the sizes are our own reading.",
)
def polyhistor_lite(
    size: int = 8,
    inner: int = 2,
    tasks: int = 1,
    task: int = 0,
    embedding: int = 64,
    sites: str | list[str] = "attention | mlp",
) -> Recipe:
    """y' = y + W_up f(W_down y), W = K_site (kron) T, T = (G_A z_task) (G_B z_task)."""
    part = PolyhistorLite(size=size, inner=inner, tasks=tasks, task=task, embedding=embedding, sites=sites)
    return Recipe(delta=part)
