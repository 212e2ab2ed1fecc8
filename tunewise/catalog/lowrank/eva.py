"""EVA: LoRA whose A starts at the leading directions of the inputs, with ranks where they explain most."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.lora import LoRA
from tunewise.init.eva import EVA


@method("eva", title="Explained Variance Adaptation", arxiv="2410.07170", lr=(1e-4, 1e-3, 5e-3))
def eva(
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    rho: float = 2.0,
    tau: float = 0.99,
    whiten: bool = False,
    sites: str | list[str] = "linear",
) -> Recipe:
    """W' = W + (alpha / rank) B A, A = V_r' of the layer's inputs X = U S V', the sum of ranks shared out anew."""
    start = EVA(rho=rho, tau=tau, whiten=whiten)
    return Recipe(delta=LoRA(rank, alpha, dropout, sites=sites, init=start))
