"""SNELL: a kernelised low-rank change whose largest entries survive."""

from __future__ import annotations

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.snell import KernelEntries


@method("snell", title="Sparse tuning with kernelised LoRA", arxiv="2411.01800", lr=(1e-3, 5e-3, 2e-2))
def snell(
    rank: int = 8,
    sparsity: float = 0.9,
    sparsify: str = "signed_square",
    sites: str | list[str] = "linear",
) -> Recipe:
    """W' = W + compete(0.1 (dist(O1, I1) - dist(O2, I2))), the largest share 1 - sparsity of it."""
    return Recipe(delta=KernelEntries(rank, sparsity, sparsify, sites=sites))  # type: ignore[arg-type]
