"""Parallel adapters beside the feed-forward sub-layer, scaled or not."""

from typing import Literal

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.adapter import ParallelAdapter


@method("parallel_adapter", title="Scaled parallel adapter", arxiv="2110.04366", lr=(1e-4, 1e-3, 5e-3))
def parallel_adapter(
    size: int = 32,
    scale: float | Literal["learned"] = 4.0,
    sites: str | list[str] = "mlp",
    function: str = "relu",
    dropout: float = 0.0,
    norm: str = "none",
    start: str = "zero",
) -> Recipe:
    """y' = y + s (W_up relu(W_down x + b_down) + b_up), s = scale.

    scale=1 with norm="before" and start="bert" is the paper's plain parallel adapter, sites="attention" its form
    beside attention, scale="learned" trains s from 1. AdapterHub: `par_bn`.
    """
    return Recipe(
        delta=ParallelAdapter(
            size=size,
            scale=scale,
            function=function,  # type: ignore[arg-type]
            dropout=dropout,
            sites=sites,
            norm=norm,  # type: ignore[arg-type]
            start=start,  # type: ignore[arg-type]
        )
    )
