"""Hydra: a parallel and a sequential low-rank branch."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.hydra import Hydra


@method("hydra", title="Hydra: multi-head low-rank adaptation", arxiv="2309.06922", lr=(1e-4, 1e-3, 5e-3))
def hydra(
    rank: int = 4,
    sequential: int = 8,
    alpha: float = 4.0,
    dropout: float = 0.0,
    sites: str | list[str] = "output | down",
) -> Recipe:
    """y = y_0 + s B A x + s D C y_0, y_0 = W x + b, s = alpha / rank."""
    return Recipe(delta=Hydra(rank=rank, alpha=alpha, dropout=dropout, sites=sites, sequential=sequential))
