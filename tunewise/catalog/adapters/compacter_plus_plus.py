"""Compacter++: Compacter after the feed-forward sub-layer alone."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe

from .compacter import compacter


@method("compacter_plus_plus", title="Compacter++", arxiv="2106.04647", lr=(1e-3, 3e-3, 1e-2))
def compacter_plus_plus(
    reduction: int = 32, n: int = 4, rank: int | None = 1, norms: bool = True, zero: bool = False
) -> Recipe:
    """y' = y + H_up^T f(H_down^T y + b_down) + b_up after the feed-forward sub-layer; else as compacter."""
    return compacter(reduction, n, rank, norms, zero, "mlp")
