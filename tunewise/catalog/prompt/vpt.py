"""VPT-deep: learnt states in front of every block, of images and of text."""

from typing import Literal

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.deep_prompt import DeepPrompt


@method("vpt", title="Visual prompt tuning, deep", arxiv="2203.12119", lr=(3e-3, 3e-2, 1e-1))
def vpt(
    tokens: int = 8, sites: str | list[str] = "block", start: Literal["uniform", "normal"] = "uniform"
) -> Recipe:
    """h_l = block_l([P_l; h_{l-1}]), P_l trained, its own outputs dropped."""
    return Recipe(delta=DeepPrompt(tokens, sites, start=start))
