"""NOLA: low-rank factors as mixtures of random bases."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.nola import NOLA


@method("nola", title="NOLA", arxiv="2310.02556", lr=(1e-3, 1e-2, 5e-2))
def nola(
    rank: int = 8,
    alpha: float = 8.0,
    basis: int = 512,
    seed: int = 0,
    dropout: float = 0.0,
    sites: str | list[str] = "query | value",
) -> Recipe:
    """W' = W + (alpha / rank) B A, A = A_0 + sum_j alpha_j A_j / sqrt(k), B = sum_j beta_j B_j / sqrt(k)."""
    return Recipe(delta=NOLA(rank=rank, alpha=alpha, dropout=dropout, sites=sites, basis=basis, seed=seed))
