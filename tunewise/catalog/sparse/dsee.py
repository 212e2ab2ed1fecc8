"""DSEE: a low-rank and a sparse change, and on request a pruned base."""

from __future__ import annotations

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.dsee import PrunedWeights
from tunewise.delta.entries import FewEntries
from tunewise.delta.lora import LoRA
from tunewise.delta.select_entries import Decomposed


@method(
    "dsee",
    title="Dually sparsity-embedded efficient tuning",
    arxiv="2111.00160",
    lr=(1e-4, 1e-3, 5e-3),
    unverified="The decomposition ends where spikes stand out most instead of after 100 rounds, and pruning happens "
    "within one run at a given step, on all linear layers, instead of between two runs.",
)
def dsee(
    rank: int = 4,
    alpha: float = 32.0,
    entries: int = 64,
    sparsity: float = 0.0,
    at: float = 0.5,
    sites: str | list[str] = "query | value",
) -> Recipe:
    """W' = W + (alpha / rank) (B A + scatter(values)), at the largest entries of S in W = U V + S + E.

    With sparsity > 0 that share of all linear weights is pruned after `at` of the run, and the change repairs it. The
    structured form (pruned heads) is left out.
    """
    deltas = [
        FewEntries(Decomposed(number=entries), alpha / rank, sites=sites),
        LoRA(rank, alpha, sites=sites),
    ]
    pruned = [PrunedWeights(sparsity, at)] if sparsity else []
    return Recipe(delta=[*pruned, *deltas])
