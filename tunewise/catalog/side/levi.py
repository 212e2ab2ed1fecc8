"""LEVI: an ensemble over all layers of a frozen model and a small model that knows the task's rows alone."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.levi import Views


@method(
    "levi",
    title="Layer-wise ensemble of different views (LEVI)",
    arxiv="2402.04644",
    lr=(1e-3, 3e-3, 1e-2),
    unverified="No code was published: the small model, the gate and one classifier for all layers are our reading.",
)
def levi(size: int = 64, small: bool = True, taps: str = "block", sites: str | list[str] = "end") -> Recipe:
    """y' = Up sum_l softmax(v)_l (gelu(mean A_l h_l) * sigmoid(G_l u) + W_l u), u = tanh(mean E[ids])."""
    return Recipe(delta=Views(size=size, small=small, taps=taps, sites=sites))
