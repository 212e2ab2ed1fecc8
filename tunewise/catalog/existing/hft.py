"""HFT: half of the matrices of every block is trained, another half in every stage."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.half import HalfWeights


@method("hft", title="Half fine-tuning", arxiv="2404.18466", lr=(1e-5, 1e-4, 5e-4))
def hft(share: float = 0.5, level: str = "category", seed: int = 0) -> Recipe:
    """theta' = theta + M (trained change), M a random half of attention, MLP and norms; embeddings and head always."""
    return Recipe(delta=HalfWeights(share=share, level=level, seed=seed))  # type: ignore[arg-type]
