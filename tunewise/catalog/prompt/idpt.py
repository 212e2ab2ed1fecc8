"""IDPT: one prompt before the last block, from a graph over the instance's own tokens."""

from typing import Literal

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.generators import EdgeConv
from tunewise.delta.instruction import Instruction
from tunewise.delta.prompt_generator import PromptGenerator


@method("idpt", title="Instance-aware dynamic prompt tuning", arxiv="2304.07221", lr=(1e-3, 5e-3, 2e-2))
def idpt(
    neighbours: int = 20,
    layers: int = 3,
    norm: Literal["layer", "batch"] = "layer",
    sites: str | list[str] = "layers[-1] & block",
) -> Recipe:
    """h = block([P; h]), P = max_i act(W [x_1; ..; x_L])_i, x_l = max over neighbours of act(W_l [x_j - x_i; x_i]).

    The published form normalises by batch and hands [CLS; P; max over tokens] to the head; here the norm is a layer's
    unless asked for, as a batch's ties rows together, and the head is the model's.
    """
    generator = EdgeConv(neighbours=neighbours, layers=layers, norm=norm)
    return Recipe(delta=[Instruction(), PromptGenerator(1, sites, generator=generator)])
