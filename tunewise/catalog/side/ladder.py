"""A ladder side network: nothing is sent back through the backbone."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.side import Ladder


@method("ladder", title="Ladder side network", arxiv="2206.06522", lr=(5e-4, 3e-3, 1e-2))
def ladder(reduction: int = 8, sites: str | list[str] = "layers[-1]") -> Recipe:
    """y' = y + Up(s_L), s_i = block_i(mu_i s_{i-1} + (1 - mu_i) D_i h_i); simpler than LST, see Ladder."""
    return Recipe(delta=Ladder(reduction, sites=sites))
