"""LoRA: low-rank adaptation."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.lora import LoRA


@method("lora", title="Low-Rank Adaptation", arxiv="2106.09685", lr=(1e-4, 1e-3, 5e-3))
def lora(
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    scaling: str = "rank",
    sites: str | list[str] = "linear",
) -> Recipe:
    """W' = W + (alpha / rank) B A."""
    return Recipe(delta=LoRA(rank, alpha, dropout, scaling, sites))  # type: ignore[arg-type]
