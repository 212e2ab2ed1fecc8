"""DoRA: weight-decomposed low-rank adaptation."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.dora import DoRA


@method("dora", title="Weight-Decomposed Low-Rank Adaptation", arxiv="2402.09353", lr=(1e-4, 1e-3, 5e-3))
def dora(
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    scaling: str = "rank",
    sites: str | list[str] = "linear",
) -> Recipe:
    """W' = diag(m / |W + s B A|) (W + s B A), s = alpha / rank, a norm and a magnitude per output row."""
    return Recipe(delta=DoRA(rank, alpha, dropout, scaling, sites))  # type: ignore[arg-type]
