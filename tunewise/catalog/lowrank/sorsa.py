"""SORSA: singular triplets of W are trained and kept orthonormal."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.gated import GatedLowRank
from tunewise.objective.orthogonality import Orthogonality
from tunewise.objective.task_loss import TaskLoss


@method(
    "sorsa",
    title="Singular Values and Orthonormal Regularized Singular Vectors Adaptation",
    arxiv="2409.00055",
    lr=(5e-5, 5e-4, 2e-3),
)
def sorsa(
    rank: int = 8,
    alpha: float | None = None,
    orthogonality: float = 4e-4,
    sites: str | list[str] = "linear",
) -> Recipe:
    """W' = W + B diag(S) A - U_r S_r V_r', loss + orthogonality * mean(|A A' - I|, |B' B - I|)."""
    return Recipe(
        delta=GatedLowRank(rank, alpha or rank, sites=sites, start="svd"),
        objective=[TaskLoss(), Orthogonality(orthogonality)],
    )
