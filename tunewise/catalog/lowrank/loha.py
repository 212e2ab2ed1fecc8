"""LoHa: low-rank Hadamard product."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.loha import LoHa


@method("loha", title="Low-rank Hadamard product", arxiv="2108.06098", lr=(2e-3, 1e-2, 3e-2))
def loha(
    rank: int = 8,
    alpha: float = 8.0,
    rank_dropout: float = 0.0,
    module_dropout: float = 0.0,
    sites: str | list[str] = "linear",
) -> Recipe:
    """W' = W + (alpha / rank) (w1_a w1_b) * (w2_a w2_b)."""
    return Recipe(delta=LoHa(rank, alpha, rank_dropout, module_dropout, sites))
