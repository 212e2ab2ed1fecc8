"""SaRA: the smallest weights are trained, towards a low rank."""

from __future__ import annotations

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.reselect import ReselectedEntries
from tunewise.delta.select_entries import Below
from tunewise.objective.nuclear import NuclearNorm
from tunewise.objective.task_loss import TaskLoss


@method("sara", title="Sparse low-rank adaptation", arxiv="2409.06633", lr=(2e-4, 1e-3, 3e-3))
def sara(
    threshold: float = 2e-3,
    nuclear: float = 5e-4,
    wider: int = 64,
    progressive: float = 2500,
    sites: str | list[str] = "linear",
) -> Recipe:
    """W' = W + scatter(values) at |w| < threshold, with the penalty nuclear |W' * M|_*.

    After `progressive` steps (below 1: a share of the run) those that are still so small go on alone. Weights only:
    biases and norms of the published selection are left out. Values hold changes, so that weight decay pulls to the
    pretrained value.
    """
    delta = ReselectedEntries(Below(threshold), sites=sites, every=progressive, times=1, within=True)
    return Recipe(delta=delta, objective=[TaskLoss(), NuclearNorm(nuclear, wider)])
