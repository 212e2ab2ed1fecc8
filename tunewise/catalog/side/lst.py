"""Ladder Side-Tuning: a small transformer beside the frozen backbone, started from its pruned weights."""

from typing import Literal

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.side_chain import LadderSide


@method("lst", title="Ladder Side-Tuning (LST)", arxiv="2206.06522", lr=(1e-3, 3e-3, 5e-3))
def lst(
    reduction: int = 8,
    taps: str = "block",
    start: Literal["pruned", "random"] = "pruned",
    sites: str | list[str] = "end",
) -> Recipe:
    """y' = Up norm(s_L), s_i = block_i(mu_i s_{i-1} + (1 - mu_i) D_i h_i), blocks from pruned backbone weights."""
    return Recipe(delta=LadderSide(reduction=reduction, taps=taps, beginning=start, sites=sites))
