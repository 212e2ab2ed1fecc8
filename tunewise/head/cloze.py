"""Classification as a cloze: which label word does the language model put into the gap?"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tunewise.core.errors import UserError, did_you_mean

from .base import Head, label_names, logits_of, sequence_mask

__all__ = ["ClozeHead"]

GAP, TEXT = "{mask}", "{text}"


class ClozeHead(Head):
    """logits[c] = the language model's logit of label c's word at the gap, `[rows, classes]`; nothing is new.

    template    a sentence with {text} and {mask}; for a causal model {mask} comes last, and what follows it
                is left out
    verbalizer  {label: word}, each word one token of the tokenizer; the label names if not given
    mask, mask_id, words  learnt from the tokenizer: the gap's token (empty for causal models), the words
    Source: Schick & Schuetze, 2021 (PET). Raises `UserError` for words of several tokens, two labels with one
    word, labels without a word, and rows whose gap was cut off.
    """

    auto: ClassVar[str] = "masked_lm"
    template: str = "{text} It was {mask}."
    verbalizer: dict[Any, str] | None = None
    mask: str | None = None
    mask_id: int | None = None
    words: list[int] | None = None

    def auto_for(self, config: Any) -> str:
        """Masked language models are read at the mask, causal ones after the last token."""
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

        named = " ".join(getattr(config, "architectures", None) or ())
        masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING and "CausalLM" not in named
        if masked or "ForMaskedLM" in named:
            return "masked_lm"
        return "causal_lm" if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else self.auto

    def setup(self, task: Any, tokenizer: Any, model: nn.Module) -> None:
        labels = label_names(task)
        if not labels:
            raise UserError(f"ClozeHead answers with label words, and the task {task.name} has no labels.")
        if self.template.count(GAP) != 1 or self.template.count(TEXT) != 1:
            raise UserError(
                f'ClozeHead: the template "{self.template}" must hold {TEXT} and {GAP} once each.'
            )
        if getattr(model, "get_output_embeddings", lambda: None)() is None:
            raise UserError(
                f"ClozeHead needs a language model, and {type(model).__name__} has no output layer over "
                "words; use ClassHead()."
            )
        causal = self.auto_for(getattr(model, "config", None)) == "causal_lm"
        if causal and self.template.index(GAP) < self.template.index(TEXT):
            raise UserError(
                f'ClozeHead: for a causal model {GAP} must come after {TEXT} in "{self.template}".'
            )
        if not causal and tokenizer.mask_token is None:
            raise UserError("ClozeHead: the tokenizer of this masked language model has no mask token.")
        if causal and tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id:
            raise UserError("ClozeHead: this tokenizer ends each text with an end token, so no gap follows.")
        self.mask = "" if causal else tokenizer.mask_token
        self.mask_id = None if causal else int(tokenizer.mask_token_id)
        self.words = self._word_tokens(labels, tokenizer)

    def _word_tokens(self, labels: list[str], tokenizer: Any) -> list[int]:
        given = {str(k): v for k, v in (self.verbalizer or {}).items()} or {label: label for label in labels}
        for label in given:
            if label not in labels:
                raise UserError(
                    f'ClozeHead: the verbalizer has "{label}", which is no label{did_you_mean(label, labels)}'
                )
        found: dict[int, str] = {}
        for label in labels:
            if label not in given:
                raise UserError(f'ClozeHead: the verbalizer gives no word for the label "{label}".')
            token = self._one_token(label, given[label], tokenizer)
            if token in found:
                raise UserError(f'ClozeHead: the labels "{found[token]}" and "{label}" have the same word.')
            found[token] = label
        return list(found)

    def _one_token(self, label: str, word: str, tokenizer: Any) -> int:
        """The token of the word where the gap is: byte-pair vocabularies hold " good" and "good" apart."""
        before = self.template[: self.template.index(GAP)].replace(TEXT, "a")
        start = tokenizer(before.rstrip(), add_special_tokens=False)["input_ids"]
        whole = tokenizer(before + word, add_special_tokens=False)["input_ids"]
        rest = whole[len(start) :]
        if whole[: len(start)] != start or len(rest) != 1 or rest[0] == tokenizer.unk_token_id:
            shown = "unknown" if tokenizer.unk_token_id in rest else f"{len(rest)} tokens"
            raise UserError(
                f'ClozeHead: the word "{word}" of the label "{label}" is {shown} in this tokenizer and must '
                f'be one token; choose another with verbalizer={{"{label}": "..."}}.'
            )
        return int(rest[0])

    def render(self, row_text: str) -> str:
        """The row inside the template; only the template's own {mask} is replaced, never one in the text."""
        if self.mask is None:
            raise UserError("ClozeHead learns its mask token from a tokenizer first: call setup.")
        start, _, end = self.template.partition(TEXT)
        if not self.mask:
            return (start + row_text + end.partition(GAP)[0]).rstrip()
        return start.replace(GAP, self.mask) + row_text + end.replace(GAP, self.mask)

    def logits(self, t: Any, outputs: Any, batch: Any) -> Tensor:
        logits, ids = logits_of(outputs), batch.inputs["input_ids"]
        mask = sequence_mask(batch.inputs, ids.shape, logits.device)
        here = mask if self.mask_id is None else mask & (ids == self.mask_id)
        lost = (~here.any(1)).nonzero()
        if len(lost):
            raise UserError(
                f"Row {batch.ids[int(lost[0])]}: the gap of the template was cut off; raise max_length."
            )
        positions = torch.arange(ids.shape[1], device=ids.device)
        if self.template.index(GAP) > self.template.index(TEXT):
            at = torch.where(here, positions, 0).amax(1)
        else:
            at = torch.where(here, positions, ids.shape[1]).amin(1)
        at = at + logits.shape[1] - ids.shape[1]  # soft prompts stand in front
        return logits[torch.arange(len(ids), device=ids.device), at][:, self.words].float()
