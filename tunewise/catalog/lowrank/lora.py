"""LoRA: low-rank adaptation."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.lora import LoRA
from tunewise.init.base import Init


@method("lora", title="Low-Rank Adaptation", arxiv="2106.09685", lr=(1e-4, 1e-3, 5e-3))
def lora(
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    scaling: str = "rank",
    sites: str | list[str] = "linear",
    init: Init | None = None,
) -> Recipe:
    """W' = W + (alpha / rank) B A."""
    return Recipe(delta=LoRA(rank, alpha, dropout, scaling, sites, init))  # type: ignore[arg-type]
