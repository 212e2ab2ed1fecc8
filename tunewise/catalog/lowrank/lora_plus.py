"""LoRA+: B learns faster than A."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.lora import LoRA
from tunewise.optim.adamw import AdamW


@method("lora_plus", title="LoRA+", arxiv="2402.12354", lr=(5e-5, 5e-4, 2e-3))
def lora_plus(
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    sites: str | list[str] = "linear",
    ratio: float = 16.0,
) -> Recipe:
    """W' = W + (alpha / rank) B A, with the learning rate lr for A and ratio * lr for B."""
    return Recipe(
        delta=LoRA(rank, alpha, dropout, sites=sites), optimizer=AdamW(rates={"direction.B": ratio})
    )
