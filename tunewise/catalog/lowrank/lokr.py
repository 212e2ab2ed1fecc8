"""LoKr: low-rank Kronecker product."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.lokr import LoKr


@method("lokr", title="Low-rank Kronecker product", arxiv="2309.14859", lr=(1e-3, 5e-3, 2e-2))
def lokr(
    rank: int = 8,
    alpha: float = 8.0,
    factor: int = -1,
    decompose_both: bool = False,
    start: str = "w1",
    rank_dropout: float = 0.0,
    rank_dropout_scale: bool = False,
    module_dropout: float = 0.0,
    sites: str | list[str] = "linear",
) -> Recipe:
    """W' = W + (alpha / rank) kron(w1, w2)."""
    drops = (rank_dropout, rank_dropout_scale, module_dropout)
    return Recipe(delta=LoKr(rank, alpha, factor, decompose_both, start, *drops, sites))  # type: ignore[arg-type]
