"""DVPT: dynamic prompts that read an instance's tokens and are read back, or the form of the released code."""

from typing import Literal

from tunewise.core.errors import UserError
from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.carried_prompt import CarriedPrompt
from tunewise.delta.generators import LatentQueries
from tunewise.delta.instruction import Instruction
from tunewise.delta.prompt_generator import PromptReadBack
from tunewise.delta.shared_bottleneck import SharedBottleneck


@method(
    "dvpt",
    title="Dynamic visual prompt tuning",
    arxiv="2307.09787",
    lr=(3e-4, 3e-3, 3e-2),
    unverified='variant="paper" follows the abstract; how tokens read the prompts back is our reading.',
)
def dvpt(
    variant: Literal["paper", "code"] = "paper",
    tokens: int = 50,
    size: int = 20,
    every: int = 3,
    sites: str | list[str] = "block",
) -> Recipe:
    """h' = h + g softmax(Z A' / sqrt r) A W_up, A = softmax(Q Z' / sqrt r) Z, Z = h W_down, shared by `every` blocks.

    variant="code" is what was released: `tokens` prompts in front of the first block, and g W_up f(W_down x) beside
    every feed-forward sub-layer; the cross-attention that stands there too is computed and never used.
    """
    if variant == "paper":
        generator = LatentQueries(size=size, every=every)
        return Recipe(delta=[Instruction(), PromptReadBack(tokens, generator, sites)])
    if sites != "block":
        raise UserError('dvpt: variant="code" has its prompts in front of all blocks: leave sites out.')
    return Recipe(delta=[CarriedPrompt(tokens), SharedBottleneck(size, every)])
