"""MAM adapters: a prefix for attention, a scaled parallel adapter for the feed-forward sub-layer."""

from typing import Literal

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.adapter import ParallelAdapter
from tunewise.delta.prefix import Prefix
from tunewise.optim.adamw import AdamW


@method("mam", title="Mix-and-match adapter", arxiv="2110.04366", lr=(1e-4, 1e-3, 5e-3))
def mam(
    tokens: int = 16,
    size: int = 16,
    scale: float | Literal["learned"] = 2.0,
    hidden: int | None = 800,
    dropout: float = 0.0,
) -> Recipe:
    """softmax(q [P_K; K]^T) [P_V; V] in attention, y' = y + s (W_up relu(W_down x + b_down) + b_up) beside the MLP.

    The prefix is written by a network of `hidden` units (None: trained itself). Sizes are the paper's for GLUE; for
    summarisation it takes tokens=30, size=512, scale=4. AdapterHub: `mam`. The network's weights learn at a tenth of
    the rate, which is ours: at a rate that suits the adapter, hundreds of units together move the prefix too far.
    """
    adapter = ParallelAdapter(size=size, scale=scale, dropout=dropout, sites="mlp")
    slow = AdamW(rates={"weight.W1": 0.1, "weight.W2": 0.1}) if hidden else None
    return Recipe(
        delta=[Prefix(tokens, "attention", hidden), adapter], defaults={"optimizer": slow} if slow else None
    )
