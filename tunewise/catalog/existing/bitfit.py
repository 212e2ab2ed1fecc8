"""BitFit: biases alone."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.existing import ExistingWeights


@method("bitfit", title="Bias tuning", arxiv="2106.10199", lr=(5e-4, 3e-3, 1e-2))
def bitfit(sites: str | list[str] = "all") -> Recipe:
    """b' = b + trained change, for every bias, those of norms included; refused on models without biases."""
    return Recipe(delta=ExistingWeights(sites, "bias", required=True))
