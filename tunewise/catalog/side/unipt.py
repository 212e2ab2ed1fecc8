"""UniPT: every layer's states are attended to in parallel and weighed by confidence."""

from typing import Literal

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.unipt import Parallel


@method(
    "unipt",
    title="Universal parallel tuning (UniPT)",
    arxiv="2308.14316",
    lr=(5e-4, 2e-3, 5e-3),
    unverified="The code reads out at one position; here every position is an anchor, which for one is the same.",
)
def unipt(
    variant: Literal["anchor", "projected"] = "anchor",
    reduction: int = 4,
    zero: bool = False,
    taps: str = "block",
    sites: str | list[str] = "end",
) -> Recipe:
    """y' = y + Up relu(sum_i c_i (w_i + 1) t_i), w_i = relu(a t_i^T) rows of sum 1, c = softmax g(a * t_i)."""
    return Recipe(delta=Parallel(variant=variant, reduction=reduction, zero=zero, taps=taps, sites=sites))
