"""EPT: a short prompt, enriched from a low-rank change of the input's embeddings."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.fused_prompt import FusedPrompt


@method(
    "ept",
    title="Efficient prompt tuning",
    arxiv="2405.11464",
    lr=(3e-4, 3e-3, 3e-2),
    unverified="only summaries could be read: the sizes of fusion and projections, their start at 0, and one learning "
    "rate for all are our reading.",
)
def ept(tokens: int = 40, length: int = 100, reach: int = 256, size: int = 16, spaces: int = 4) -> Recipe:
    """f([P*; E + A B]), P* = P_f + sum_k g_k U_k relu(D_k P_f), P_f = P + softmax(P W_q (A B W_k)') A B V."""
    return Recipe(delta=FusedPrompt(tokens, length=length, reach=reach, size=size, spaces=spaces))
