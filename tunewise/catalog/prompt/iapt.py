"""IAPT: a few prompts per block, generated from the instruction."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.generators import AttentionPool
from tunewise.delta.instruction import Instruction
from tunewise.delta.prompt_generator import PromptGenerator


@method(
    "iapt",
    title="Instruction-aware prompt tuning",
    arxiv="2405.18203",
    lr=(1e-3, 3e-3, 1e-2),
    unverified="only summaries could be read: the start of the projections, and training the activations together "
    "with everything else instead of in turns, are our reading.",
)
def iapt(
    tokens: int = 4, size: int = 128, every: int | None = None, sites: str | list[str] = "block"
) -> Recipe:
    """h_l = block_l([P_l; h]), P_l = F_l(S' U) W_up, U = H W_down, S = softmax_tokens(U W_l), F_l rational."""
    generator = AttentionPool(size=size, every=every)
    return Recipe(delta=[Instruction(), PromptGenerator(tokens, sites, generator=generator)])
