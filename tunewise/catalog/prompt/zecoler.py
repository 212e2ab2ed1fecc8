"""Zecoler: P-tuning and a cloze, for answers that carry over to another (programming) language."""

from typing import Any, Literal

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.existing import ExistingWeights
from tunewise.delta.prompt_encoder import EncodedPrompt
from tunewise.head.cloze import ClozeHead


@method("zecoler", title="Zecoler: P-tuning with a cloze", arxiv="2404.08922", lr=(1e-5, 5e-5, 3e-4))
def zecoler(
    tokens: int = 10,
    network: Literal["lstm", "mlp"] = "lstm",
    template: str = "{text} {mask}",
    verbalizer: dict[Any, str | list[str]] | None = None,
    frozen: bool = False,
) -> Recipe:
    """logits_c = LM([P; template(x)])[mask, word_c], P = MLP(LSTM(E_P)); the backbone is trained too unless frozen.

    Trained on rows of one language and used on another's as it is. All prompt slots stand in front of the text, where
    the published form has them around the mask.
    """
    prompt = EncodedPrompt(tokens, network=network)
    head = ClozeHead(template=template, verbalizer=verbalizer)
    return Recipe(delta=prompt if frozen else [prompt, ExistingWeights("all")], head=head)
