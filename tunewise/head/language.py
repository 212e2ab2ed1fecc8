"""The language model's own output layer."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from tunewise.core.errors import UserError

from .base import Head, takes_positions

__all__ = ["LMHead"]


class LMHead(Head):
    """logits = the language model's own output layer, `[rows, tokens, words]`; trains nothing by itself.

    Raises `UserError` for a model without an output layer over words.
    """

    auto: ClassVar[str] = "causal_lm"

    def setup(self, task: Any, tokenizer: Any, model: nn.Module) -> None:
        layer = getattr(model, "get_output_embeddings", lambda: None)()
        if layer is None:
            raise UserError(
                f"LMHead: {type(model).__name__} has no output layer over words; load it as a causal model."
            )
        task.position_ids = takes_positions(model)
