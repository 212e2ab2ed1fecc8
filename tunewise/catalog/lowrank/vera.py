"""VeRA: vector-based random matrix adaptation."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.vera import VeRA


@method("vera", title="Vector-based random matrix adaptation", arxiv="2310.11454", lr=(2e-3, 1e-2, 3e-2))
def vera(
    rank: int = 256,
    d_initial: float = 0.1,
    dropout: float = 0.0,
    seed: int = 0,
    sites: str | list[str] = "linear",
) -> Recipe:
    """W' = W + diag(b) B diag(d) A, A and B random and shared."""
    return Recipe(delta=VeRA(rank, d_initial, dropout, seed, sites))
