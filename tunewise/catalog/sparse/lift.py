"""LIFT: the principal weights are trained, the largest ones after rank reduction."""

from __future__ import annotations

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.reselect import ReselectedEntries
from tunewise.delta.select_entries import Principal
from tunewise.optim.adamw import AdamW


@method("lift", title="Low-rank informed sparse fine-tuning", arxiv="2506.00772", lr=(1e-4, 5e-4, 2e-3))
def lift(rank: int = 128, kept: int = 128, every: float = 400, sites: str | list[str] = "linear") -> Recipe:
    """W' = W + scatter(values) at the rank (in + out) largest |W'_kept|, W'_kept = W' of rank `kept`, every n steps."""
    delta = ReselectedEntries(Principal(rank=rank, kept=kept), sites=sites, every=every)
    return Recipe(delta=delta, defaults={"optimizer": AdamW(decay=0.0, betas=(0.9, 0.95), eps=1e-6)})
