"""rsLoRA: the factor of LoRA that stays stable as the rank grows."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.lora import LoRA


@method("rslora", title="Rank-Stabilized LoRA", arxiv="2312.03732", lr=(1e-4, 1e-3, 3e-3))
def rslora(
    rank: int = 8, alpha: float = 16.0, dropout: float = 0.0, sites: str | list[str] = "linear"
) -> Recipe:
    """W' = W + (alpha / sqrt(rank)) B A."""
    return Recipe(delta=LoRA(rank, alpha, dropout, "sqrt", sites))
