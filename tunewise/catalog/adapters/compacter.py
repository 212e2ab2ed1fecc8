"""Compacter: adapters of Kronecker products whose small factors all layers share."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.existing import ExistingWeights
from tunewise.delta.phm import CompacterAdapter


@method("compacter", title="Compacter", arxiv="2106.04647", lr=(1e-3, 3e-3, 1e-2))
def compacter(
    reduction: int = 32,
    n: int = 4,
    rank: int | None = 1,
    norms: bool = True,
    zero: bool = False,
    sites: str | list[str] = "attention | mlp",
) -> Recipe:
    """y' = y + H_up^T f(H_down^T y + b_down) + b_up, H = sum_i A_i (kron) s_i t_i, A shared by all; norms trained.

    rank=None leaves s_i t_i whole: a PHM adapter. AdapterHub: `compacter`, there without the norms.
    """
    adapter = CompacterAdapter(reduction=reduction, n=n, rank=rank, zero=zero, sites=sites)
    return Recipe(delta=[adapter, ExistingWeights("norm")] if norms else adapter)
