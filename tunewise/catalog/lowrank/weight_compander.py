"""Weight compander: weights, or their changes, kept within bounds by a function."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.compander import CompandedChange, Compander


@method(
    "weight_compander",
    title="Weight compander",
    arxiv="2306.16993",
    lr=(3e-5, 2e-4, 1e-3),
    unverified="only the abstract could be read: arctan as the bounded function, and its start, are our reading.",
)
def weight_compander(
    slope: float = 1.5, learned: bool = False, change: bool = False, sites: str | list[str] = "linear"
) -> Recipe:
    """W' = a arctan(v / b), b = a / slope; with `change`, W' = W + a arctan(v / b)."""
    return Recipe(delta=(CompandedChange if change else Compander)(slope, learned, sites))
