"""CorDA: LoRA that starts in directions weighed by the inputs' covariance."""

from typing import Any

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.lora import LoRA
from tunewise.init.corda import CorDA


@method("corda", title="Context-Oriented Decomposition Adaptation", arxiv="2406.05223", lr=(1e-4, 1e-3, 2e-3))
def corda(
    rank: int = 8,
    alpha: float | None = None,
    mode: Any = "ipm",
    rows: int = 256,
    sites: str | list[str] = "linear",
) -> Recipe:
    """W' = W + B A - B_0 A_0, B_0 A_0 = U_K S_K V_K' C^-1 of W C = U S V', C the covariance of the inputs."""
    return Recipe(delta=LoRA(rank, alpha or rank, sites=sites, init=CorDA(mode=mode, rows=rows)))
