"""IA3: three vectors per block."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.ia3 import InputScale
from tunewise.delta.scale import Scale


@method(
    "ia3",
    title="Infused adapter by inhibiting and amplifying inner activations",
    arxiv="2205.05638",
    lr=(3e-3, 1e-2, 3e-2),
)
def ia3(sites: str | list[str] = "key | value", inputs: str | list[str] = "down") -> Recipe:
    """k' = l_k k, v' = l_v v, and l_ff on what the second linear layer of the MLP reads; all start at 1."""
    return Recipe(delta=[Scale(sites), InputScale(inputs)])
