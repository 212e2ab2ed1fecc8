"""Prefix tuning: learnt keys and values in every attention."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.prefix import Prefix


@method("prefix_tuning", title="Prefix tuning", arxiv="2101.00190", lr=(2e-4, 1e-3, 5e-3))
def prefix_tuning(
    tokens: int = 16,
    sites: str | list[str] = "attention",
    hidden: int | None = 512,
    gated: bool = False,
) -> Recipe:
    """softmax(q [P_K; K]^T) [P_V; V], [P_K; P_V] = W_2 tanh(W_1 E + b_1) + b_2; hidden=None trains P_K and P_V."""
    return Recipe(delta=Prefix(tokens, sites, hidden, gated))
