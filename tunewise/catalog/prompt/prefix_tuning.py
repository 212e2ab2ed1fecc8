"""Prefix tuning: learnt keys and values in every attention."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.prefix import Prefix


@method("prefix_tuning", title="Prefix tuning", arxiv="2101.00190", lr=(1e-3, 1e-2, 5e-2))
def prefix_tuning(tokens: int = 16, sites: str | list[str] = "attention") -> Recipe:
    """softmax(q [P_K; K]^T) [P_V; V], P_K and P_V trained, without the re-parameterising MLP."""
    return Recipe(delta=Prefix(tokens, sites))
