"""HUT: Hadamard updated transformation."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.hut import HUT


@method(
    "hut",
    title="Hadamard updated transformation",
    arxiv="2409.13501",
    lr=(1e-3, 5e-3, 2e-2),
    unverified="only the abstract could be read: 1 + s B A as the element-wise factor is our reading.",
)
def hut(rank: int = 8, alpha: float = 16.0, sites: str | list[str] = "linear") -> Recipe:
    """W' = W * (1 + (alpha / rank) B A)."""
    return Recipe(delta=HUT(rank=rank, alpha=alpha, sites=sites))
