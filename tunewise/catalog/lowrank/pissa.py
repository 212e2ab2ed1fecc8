"""PiSSA: LoRA that starts as the principal part of W."""

from typing import Any

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.lora import LoRA
from tunewise.init.svd import SVD


@method(
    "pissa",
    title="Principal Singular Values and Singular Vectors Adaptation",
    arxiv="2404.02948",
    lr=(1e-4, 1e-3, 3e-3),
)
def pissa(
    rank: int = 8,
    alpha: float | None = None,
    svd: Any = "exact",
    iterations: int = 4,
    sites: str | list[str] = "linear",
) -> Recipe:
    """W' = W + B A - B_0 A_0, B_0 A_0 = U_r S_r V_r' of W = U S V' (alpha: rank unless given)."""
    return Recipe(delta=LoRA(rank, alpha or rank, sites=sites, init=SVD(svd, iterations)))
