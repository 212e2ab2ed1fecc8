"""PVP: prompts that were trained on a large task first are the start for a small one."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.deep_prompt import DeepPrompt
from tunewise.init.saved import FromSaved


@method(
    "pvp",
    title="Pretrained prompt modules",
    arxiv="2304.13639",
    lr=(1e-3, 1e-2, 1e-1),
    unverified="no code is public: one learning rate for prompts and head is our choice.",
)
def pvp(start: str | None = None, tokens: int = 16, sites: str | list[str] = "block") -> Recipe:
    """h_l = block_l([P_l; h]), P_l copied from the run in `start`; without one this is the first stage.

    Other modules in the same way: "lora(rank=8) + FromSaved(path='runs/first')". The rows of the first stage must
    hold none of the second's test rows.
    """
    deltas = [DeepPrompt(tokens, sites), *([FromSaved(start)] if start else [])]
    return Recipe(delta=deltas)
