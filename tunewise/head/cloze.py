"""Classification as a cloze: which label word does the language model put into the gap?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tunewise.core.errors import UserError, did_you_mean

from .base import label_names, logits_of
from .gap import GAP, TEXT, GapHead, reads_last

__all__ = ["ClozeHead"]


class ClozeHead(GapHead):
    """logits[c] = mean over templates of the max (or mean) over label c's words of the logit at the gap.

    `[rows, classes]`; nothing is new. With one template and one word per label these are plain logits.
    verbalizer  {label: word or words}, each word one token of the tokenizer; the label names if not given
    pool        "max" or "mean" over the words of a label
    stand_in    label names that are no single token get a token drawn at random, and the user is told; given
                words never do
    words, counts  learnt: the words' tokens for each template, label by label, and how many each label has
    Source: Schick & Schuetze, 2021 (PET); several words and templates: MVP, arXiv 2303.07320. Raises `UserError`
    for words of several tokens, two labels with one word, labels without a word, and rows whose gap was cut off.
    """

    auto: ClassVar[str] = "masked_lm"
    verbalizer: dict[Any, str | list[str]] | None = None
    pool: Literal["max", "mean"] = "max"
    stand_in: bool = False
    words: list[list[int]] | None = None
    counts: list[int] | None = None

    def auto_for(self, config: Any) -> str:
        """Masked language models are read at the mask, causal ones after the last token."""
        return "causal_lm" if reads_last(config) else self.auto

    def setup(self, task: Any, tokenizer: Any, model: nn.Module) -> None:
        labels = label_names(task)
        name = type(self).__name__
        if not labels:
            raise UserError(f"{name} answers with label words, and the task {task.name} has no labels.")
        if getattr(model, "get_output_embeddings", lambda: None)() is None:
            raise UserError(
                f"{name} needs a language model, and {type(model).__name__} has no output layer over "
                "words; use ClassHead()."
            )
        super().setup(task, tokenizer, model)
        given = self._given(labels)
        drawn = self._drawn(given, tokenizer, task) if self.stand_in and not self.verbalizer else {}
        tables = [self._tokens(given, tokenizer, drawn, t) for t in self.templates]
        self.words = [[token for tokens in table for token in tokens] for table in tables]
        self.counts = [len(tokens) for tokens in tables[0]]

    def _given(self, labels: list[str]) -> dict[str, list[str]]:
        """{label: its words} in the order of the labels."""
        given = {str(k): [v] if isinstance(v, str) else v for k, v in (self.verbalizer or {}).items()}
        given = given or {label: [label] for label in labels}
        for label in given:
            if label not in labels:
                raise UserError(
                    f'{type(self).__name__}: the verbalizer has "{label}", which is no label'
                    f"{did_you_mean(label, labels)}"
                )
        for label in labels:
            if not given.get(label):
                raise UserError(
                    f'{type(self).__name__}: the verbalizer gives no word for the label "{label}".'
                )
        return {label: given[label] for label in labels}

    def _tokens(
        self, given: Mapping[str, list[str]], tokenizer: Any, drawn: Mapping[str, int], template: str
    ) -> list[list[int]]:
        found: dict[int, str] = {}
        table: list[list[int]] = []
        for label, words in given.items():
            tokens = [drawn[label]] if label in drawn else []
            for word in words if label not in drawn else ():
                token = self.one_token(label, word, tokenizer, template)
                if found.get(token, label) != label:
                    raise UserError(
                        f'{type(self).__name__}: the labels "{found[token]}" and "{label}" have the same word.'
                    )
                found[token] = label
                tokens += [token] if token not in tokens else []
            table.append(tokens)
        return table

    def _drawn(self, given: Mapping[str, list[str]], tokenizer: Any, task: Any) -> dict[str, int]:
        """{label: a token drawn at random} for labels whose name is no word of the tokenizer."""
        taken, without = set(tokenizer.all_special_ids), []
        for label, words in given.items():
            try:
                taken |= {self.one_token(label, words[0], tokenizer, t) for t in self.templates}
            except UserError:
                without.append(label)
        free = [i for i in range(len(tokenizer)) if i not in taken]
        if len(free) < len(without):
            raise UserError(f"{type(self).__name__}: the tokenizer has too few tokens for these labels.")
        order = torch.randperm(len(free), generator=torch.Generator().manual_seed(0)).tolist()
        drawn = {label: free[i] for label, i in zip(without, order, strict=False)}
        if drawn:
            shown = ", ".join(f'"{tokenizer.convert_ids_to_tokens(i)}" for "{k}"' for k, i in drawn.items())
            sentence = (
                f"Label names that are no single token got random label words: {shown} (verbalizer=...)."
            )
            if hasattr(task, "notes"):
                task.notes.append(sentence)
        return drawn

    def one_token(self, label: str, word: str, tokenizer: Any, template: str) -> int:
        """The token of the word where the gap is: byte-pair vocabularies hold " good" and "good" apart."""
        before = template[: template.index(GAP)].replace(TEXT, "a")
        start = tokenizer(before.rstrip(), add_special_tokens=False)["input_ids"]
        whole = tokenizer(before + word, add_special_tokens=False)["input_ids"]
        rest = whole[len(start) :]
        if whole[: len(start)] != start or len(rest) != 1 or rest[0] == tokenizer.unk_token_id:
            shown = "unknown" if tokenizer.unk_token_id in rest else f"{len(rest)} tokens"
            raise UserError(
                f'{type(self).__name__}: the word "{word}" of the label "{label}" is {shown} in this tokenizer '
                f'and must be one token; choose another with verbalizer={{"{label}": "..."}}.'
            )
        return int(rest[0])

    def logits(self, t: Any, outputs: Any, batch: Any) -> Tensor:
        z = self.at_gap(logits_of(outputs), batch).float()
        return torch.stack([self.scores(z[:, k], k) for k in range(z.shape[1])]).mean(0)

    def scores(self, z: Tensor, which: int = 0) -> Tensor:
        """Logits over words at the gap of template `which`, `[rows, words]` -> `[rows, classes]`."""
        if self.words is None or self.counts is None:
            raise UserError(
                f"{type(self).__name__} learns its label words from a tokenizer first: call setup."
            )
        chosen = z[:, self.words[which]].split(self.counts, 1)
        return torch.stack([c.amax(1) if self.pool == "max" else c.mean(1) for c in chosen], 1)
