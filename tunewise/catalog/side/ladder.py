"""A ladder side network: nothing is sent back through the backbone."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.side import Ladder


@method("ladder", title="Ladder side network", arxiv="2206.06522", lr=(1e-3, 5e-3, 1e-2))
def ladder(reduction: int = 8, sites: str | list[str] = "layers[-1]") -> Recipe:
    """y' = y + Up(s_L), s_i = block_i(mu_i s_{i-1} + (1 - mu_i) D_i h_i); feed-forward only, the full one is lst."""
    return Recipe(delta=Ladder(reduction=reduction, sites=sites))
