"""Scaled parallel adapters beside the feed-forward sub-layer."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.adapter import ParallelAdapter


@method("parallel_adapter", title="Scaled parallel adapter", arxiv="2110.04366", lr=(1e-4, 1e-3, 5e-3))
def parallel_adapter(size: int = 32, scale: float = 4.0, sites: str | list[str] = "mlp") -> Recipe:
    """y' = y + s (W_up relu(W_down x + b_down) + b_up), s = scale."""
    return Recipe(delta=ParallelAdapter(size=size, scale=scale, sites=sites))
