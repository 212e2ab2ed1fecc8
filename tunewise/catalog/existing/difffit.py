"""DiffFit: biases, norms, and a scale on every residual branch."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.existing import ExistingWeights
from tunewise.delta.scale import Scale


@method(
    "difffit",
    title="Bias, norm and branch scale tuning",
    arxiv="2304.06648",
    lr=(5e-4, 3e-3, 1e-2),
    unverified="Scales are vectors in all layers, as in a community implementation; the paper chooses shallow layers.",
)
def difffit(sites: str | list[str] = "output | down") -> Recipe:
    """h' = h + (1 + g) * Branch(norm'(h)), g at each branch's last layer; biases and norms trained."""
    return Recipe(delta=[ExistingWeights("all", "bias"), ExistingWeights("norm"), Scale(sites)])
