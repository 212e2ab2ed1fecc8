"""LayerNorm tuning: gains and biases of the norms."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.existing import ExistingWeights


@method("layernorm_tuning", title="LayerNorm tuning", arxiv="2312.11420", lr=(5e-4, 3e-3, 1e-2))
def layernorm_tuning(sites: str | list[str] = "norm") -> Recipe:
    """g', b' = g, b + trained change, for the norms at `sites`."""
    return Recipe(delta=ExistingWeights(sites, required=True))
