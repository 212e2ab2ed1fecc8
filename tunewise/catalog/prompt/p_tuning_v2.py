"""P-Tuning v2: prompts at every depth, without a network and without label words."""

from typing import Literal

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.deep_prompt import DeepPrompt
from tunewise.delta.prefix import Prefix


@method("p_tuning_v2", title="P-Tuning v2", arxiv="2110.07602", lr=(1e-3, 1e-2, 5e-2))
def p_tuning_v2(
    tokens: int = 16, form: Literal["keys", "states"] = "keys", hidden: int | None = None
) -> Recipe:
    """softmax(q [P_K; K]^T) [P_V; V] in every block; form="states": block_l([P_l; h_{l-1}]).

    As the authors' code has it: the prompts of a block are keys and values. The paper draws them as states, which is
    the other form. `hidden` makes the keys by the network that the authors leave to single tasks.
    """
    return Recipe(delta=DeepPrompt(tokens) if form == "states" else Prefix(tokens, hidden=hidden))
