"""Comp-LoRA: low-rank adaptation outside of the leading directions of W."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.comp_lora import CompLoRA


@method(
    "comp_lora",
    title="Complementary-subspace LoRA",
    arxiv="2501.15040",
    lr=(1e-4, 1e-3, 5e-3),
    unverified="how many directions are left alone (half of W's energy) is our choice: no code is public.",
)
def comp_lora(
    rank: int = 8,
    alpha: float = 16.0,
    energy: float = 0.5,
    directions: int | None = None,
    dropout: float = 0.0,
    sites: str | list[str] = "linear",
) -> Recipe:
    """W' = W + (alpha / rank) (I - U U^T) B A (I - V V^T), U, V the leading singular vectors of W."""
    return Recipe(
        delta=CompLoRA(
            rank=rank, alpha=alpha, dropout=dropout, sites=sites, energy=energy, directions=directions
        )
    )
