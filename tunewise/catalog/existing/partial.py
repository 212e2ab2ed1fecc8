"""Partial fine-tuning: a chosen part of the backbone, by default its last two layers."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.existing import ExistingWeights


@method("partial", title="Partial fine-tuning", lr=(3e-5, 2e-4, 1e-3))
def partial(sites: str | list[str] = "layers[-2:]", which: str = "all") -> Recipe:
    """theta' = theta + trained change, for the parameters at `sites`."""
    return Recipe(delta=ExistingWeights(sites, which))  # type: ignore[arg-type]
