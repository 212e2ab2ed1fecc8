"""P-tuning: a soft prompt that a small network makes."""

from typing import Literal

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.prompt_encoder import EncodedPrompt


@method("p_tuning", title="P-tuning", arxiv="2103.10385", lr=(3e-4, 3e-3, 3e-2))
def p_tuning(
    tokens: int = 16,
    network: Literal["lstm", "mlp"] = "lstm",
    hidden: int | None = None,
    layers: int = 2,
    dropout: float = 0.0,
    place: Literal["front", "after_first"] = "front",
    text: str | None = None,
) -> Recipe:
    """f([P; E(x)]), P = MLP(LSTM(E_P)), all trained; E_P starts at embeddings of tokens."""
    made = EncodedPrompt(
        tokens, place=place, text=text, network=network, hidden=hidden, layers=layers, dropout=dropout
    )
    return Recipe(delta=made)
