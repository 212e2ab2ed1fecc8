"""Biases and new output scales: a few numbers per layer."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.existing import ExistingWeights
from tunewise.delta.scale import Scale


@method("bias_scale", title="Bias and scale tuning", arxiv="2106.10199", lr=(5e-4, 3e-3, 1e-2))
def bias_scale(sites: str | list[str] = "linear") -> Recipe:
    """y' = (1 + g) * (W x + b'), b' trained (BitFit, arXiv 2106.10199) with scales g (SSF, arXiv 2210.08823)."""
    return Recipe(delta=[ExistingWeights("all", "bias"), Scale(sites)])
