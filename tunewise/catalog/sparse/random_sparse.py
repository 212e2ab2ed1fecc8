"""Random masking: a random share of the entries is trained."""

from __future__ import annotations

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.entries import SparseEntries
from tunewise.delta.select_entries import Uniform


@method("random_sparse", title="Random masking", arxiv="2405.02596", lr=(5e-4, 3e-3, 1e-2))
def random_sparse(share: float = 0.01, seed: int = 0, sites: str | list[str] = "linear") -> Recipe:
    """W' = W + scatter(values), values at share * in * out random entries; the sparser, the larger the rate."""
    return Recipe(delta=SparseEntries(Uniform(share=share), seed=seed, sites=sites))
