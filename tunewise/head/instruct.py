"""Instructions, text, options, "Answer:" and a gap: a masked language model answers with one token."""

from __future__ import annotations

from string import ascii_uppercase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tunewise.core.errors import UserError

from .base import label_names, logits_of
from .cloze import ClozeHead
from .gap import GAP, TEXT, reads_last

__all__ = ["InstructHead"]

ANCHOR = "[unused0]"
ASK = "Answer: {anchor} " + GAP


class InstructHead(ClozeHead):
    """logits[c] = the logit of option c's token at the mask behind "Answer:" and an anchor, `[rows, classes]`.

    instruction   what is asked; options  {label: what it stands for}, the label names if not given
    answers       "letters" (A, B, ..., those that are one token) or "names" (the label names, or `verbalizer`'s words)
    anchor        a token in front of the mask; [unused0] where the tokenizer has it, else none
    open          predict by the argmax over the whole vocabulary; what is no option then counts as a wrong answer.
                  One more column holds the largest logit of all other words
    The template is made from these. Nothing is new, so it works without training. Source: arXiv 2502.03793.
    Raises `UserError` for causal models, answers of several tokens, and rows whose gap was cut off.
    """

    instruction: str = "Read the text and choose the option that describes it."
    options: dict[Any, str] | None = None
    answers: Literal["letters", "names"] = "letters"
    anchor: str | None = None
    open: bool = False

    def setup(self, task: Any, tokenizer: Any, model: nn.Module) -> None:
        if reads_last(getattr(model, "config", None)):
            raise UserError(
                f"InstructHead answers at a mask, and {type(model).__name__} has none; use ClozeHead()."
            )
        labels = label_names(task)
        if tokenizer is None:
            raise UserError("InstructHead writes rows into a template: it needs the model's tokenizer.")
        ask = " ".join(ASK.replace("{anchor}", self._anchored(tokenizer)).split())
        if self.answers == "letters":
            self.verbalizer = dict(zip(labels, self._letters(labels, tokenizer, ask), strict=True))
        meant = {str(k): v for k, v in (self.options or {}).items()}
        words = {label: ws[0] for label, ws in self._given(labels).items()} if labels else {}
        lines = [
            f"- {words[n]}" + (f": {meant.get(n, n)}" if meant.get(n, n) != words[n] else "") for n in labels
        ]
        if self.open:
            task.open_answers = True
        self.template = "\n".join([self.instruction, TEXT, "Options:", *lines, ask])
        super().setup(task, tokenizer, model)
        if self.counts and max(self.counts) > 1:
            raise UserError(
                "InstructHead: every option has one answer, so the verbalizer takes one word each."
            )

    def _anchored(self, tokenizer: Any) -> str:
        wanted = ANCHOR if self.anchor is None else self.anchor
        ids = tokenizer(wanted, add_special_tokens=False)["input_ids"] if wanted else [0]
        if len(ids) == 1 and (not wanted or ids[0] != tokenizer.unk_token_id):
            return wanted
        if self.anchor is not None:
            raise UserError(f'InstructHead: the anchor "{wanted}" is not one token of this tokenizer.')
        return ""

    def _letters(self, labels: list[str], tokenizer: Any, ask: str) -> list[str]:
        found: dict[int, str] = {}
        for letter in ascii_uppercase:
            try:
                found.setdefault(self.one_token(letter, letter, tokenizer, f"{TEXT}\n{ask}"), letter)
            except UserError:
                continue
        if len(found) < len(labels):
            raise UserError(
                f"InstructHead: {len(labels)} options and {len(found)} letters that are one token each; "
                'use answers="names".'
            )
        return list(found.values())[: len(labels)]

    def logits(self, t: Any, outputs: Any, batch: Any) -> Tensor:
        found = super().logits(t, outputs, batch)
        if not self.open:
            return found
        assert self.words is not None
        rest = self.at_gap(logits_of(outputs), batch)[:, 0].float().clone()
        rest[:, self.words[0]] = -torch.inf
        return torch.cat([found, rest.amax(1, keepdim=True)], 1)
