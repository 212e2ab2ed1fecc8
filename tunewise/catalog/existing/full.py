"""Full fine-tuning: every parameter of the backbone."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.existing import ExistingWeights


@method("full", title="Full fine-tuning", lr=(1e-5, 1e-4, 3e-4))
def full() -> Recipe:
    """theta' = theta + trained change, for all parameters."""
    return Recipe(delta=ExistingWeights("all"))
