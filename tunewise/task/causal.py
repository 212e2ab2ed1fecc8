"""Causal language modelling: answers after prompts, assistant turns of conversations, or plain text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from tunewise.core.errors import UserError

from .base import LENGTH, Batch, Example, Row, Task, padded
from .chat import Piece, Tokens, conversation, prompt_answer, prompt_only, tokenize
from .generation import generate
from .metrics import exact_match, interval
from .text import longest, row_texts

__all__ = ["Causal"]

IGNORED = -100


class Causal(Task):
    """loss = - sum over answer tokens of log p(token | everything before it); logits `[rows, tokens, words]`.

    With a label column, prompts are read and answers learnt, through the tokenizer's chat template if there is
    one (`chat=False`: "prompt, new line, answer"); with a column of messages the assistant's turns are learnt;
    with neither the whole text. The end token is learnt. Padding is known by the attention mask, never by the pad id.
    Too long prompts lose their start, plain texts their end, and are counted; answers are never cut.
    `metric="exact_match"`, or a function of one's own, is measured on generated answers.
    """

    name: ClassVar[str] = "causal"
    known: ClassVar[dict[str, bool]] = {
        "loss": False, "perplexity": False, "token_accuracy": True, "exact_match": True,
    }  # fmt: skip

    def __init__(self, columns: Any, *, chat: bool | None = None, **options: Any) -> None:
        super().__init__(columns, **options)
        self.chat = chat
        self.generated_metric: str | None = None
        if self.custom is not None or self.metric == "exact_match":
            self.generated_metric, self.metric, self.higher_is_better = self.metric, "loss", False
            self.notes.append(
                f"The best state is chosen by loss; {self.generated_metric} is measured on generated answers."
            )

    def fit(self, rows: Sequence[Row]) -> None:
        """Nothing is learnt from rows; empty data is refused."""
        if not rows:
            raise UserError("There are no training rows.")
        if self.generated_metric and self.columns.label is None:
            raise UserError(f"{self.generated_metric} compares answers, and there is no answer column.")

    def default_head(self, config: Any = None) -> Any:
        """The language model's own output layer."""
        from tunewise.head import LMHead

        return LMHead()

    def encode(
        self, rows: Sequence[Row], tokenizer: Any, head: Any = None, *, labelled: bool = True
    ) -> list[Example]:
        """Token ids; labels are the token where it is learnt and -100 elsewhere."""
        if not rows:
            return []
        limit, chat = self.limit(tokenizer), self._messages(rows[0]) or self.uses_chat(tokenizer)
        tokens = tokenize([self._pieces(row, tokenizer, chat, labelled) for row in rows], tokenizer, chat)
        self._fit_length(rows, tokens, tokenizer, limit, labelled)
        examples = []
        for row, (ids, learnt) in zip(rows, tokens, strict=True):
            labels = [i if use else IGNORED for i, use in zip(ids, learnt, strict=True)] if labelled else None
            if not ids or labels is not None and all(i == IGNORED for i in labels[1:]):
                raise UserError(f"Row {row.get('id')} has no token to learn after its first one.")
            answer = self.reference(row) if labelled else None
            examples.append(
                {"id": row["id"], "input_ids": ids, "labels": labels, "reference": answer, "length": len(ids)}
            )
        return examples

    def uses_chat(self, tokenizer: Any) -> bool:
        """Whether rows go through the tokenizer's chat template."""
        template = getattr(tokenizer, "chat_template", None)
        if self.chat and not template:
            raise UserError("chat=True needs a tokenizer with a chat template, and this one has none.")
        dialogue = self.columns.label is not None
        return bool(template) and self.chat is not False and dialogue

    def _prompt(self, row: Row) -> str:
        return "\n".join(row_texts(row, self.columns.text, self.columns.optional))

    def _pieces(
        self, row: Row, tokenizer: Any, chat: bool, labelled: bool, prompt: str | None = None
    ) -> list[Piece]:
        if self._messages(row):
            return _dialogue(row, self.columns.text[0], tokenizer, labelled)
        prompt = self._prompt(row) if prompt is None else prompt
        if self.columns.label is None:
            return [Piece(prompt, labelled, labelled)]
        if not labelled:
            return [Piece(prompt_only(prompt, tokenizer, chat), False)]
        answer = row_texts(row, [self.columns.label])[0]
        return prompt_answer(prompt, answer, tokenizer, chat)

    def _messages(self, row: Row) -> bool:
        return self.columns.label is None and isinstance(row.get(self.columns.text[0]), list)

    def _fit_length(
        self, rows: Sequence[Row], tokens: list[Tokens], tokenizer: Any, limit: int, labelled: bool
    ) -> None:
        """Cuts what is too long, in place; answers that do not fit are refused together."""
        cut, needed = 0, dict[str, int]()
        for i, row in enumerate(rows):
            if len(tokens[i][0]) <= limit:
                continue
            shorter = self._shorter(row, tokens[i], tokenizer, limit, labelled)
            if shorter is None:
                needed[str(row.get("id"))] = len(tokens[i][0])
            else:
                tokens[i], cut = shorter, cut + 1
        if needed:
            first, size = next(iter(needed.items()))
            raise UserError(
                f"{len(needed):,} of {len(rows):,} rows have an answer that does not fit into max_length={limit} ("
                f"row {first} has {size} tokens in all, the longest {max(needed.values())}): "
                "raise max_length or leave those rows out."
            )
        plain = bool(rows) and self.columns.label is None and not self._messages(rows[0])
        self.note_cut(cut, len(rows), limit, "end" if plain and labelled else "start")

    def _shorter(self, row: Row, whole: Tokens, tokenizer: Any, limit: int, labelled: bool) -> Tokens | None:
        ids, learnt = whole
        if self._messages(row):
            answer = next((n for n, use in enumerate(reversed(learnt)) if not use or not labelled), len(ids))
            return (ids[-limit:], learnt[-limit:]) if answer < limit else None
        if self.columns.label is None:
            return (ids[:limit], learnt[:limit]) if labelled else (ids[-limit:], learnt[-limit:])
        chat = self.uses_chat(tokenizer)

        def encoded(prompt: str) -> Tokens:
            return tokenize([self._pieces(row, tokenizer, chat, labelled, prompt)], tokenizer, chat)[0]

        prompt = longest(self._prompt(row), limit, lambda text: len(encoded(text)[0]), end=True)
        return encoded(prompt) if prompt else None

    def _labels(self, examples: Sequence[Example], width: int, left: bool) -> Tensor:
        return padded([e["labels"] for e in examples], width, IGNORED, left)

    def _units(self, examples: Sequence[Example]) -> Tensor:
        return torch.tensor([float(sum(i != IGNORED for i in (e["labels"] or [])[1:])) for e in examples])

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """Summed cross-entropy of each row's learnt tokens; only their logits are made float32."""
        table, _ = self._token_losses(logits, batch)
        return table.sum(1)

    def _token_losses(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(loss, whether the likeliest token is right), `[rows, tokens - 1]`, 0 where nothing is learnt."""
        if batch.labels is None:
            raise UserError(f"Row {batch.ids[0]} and its batch have no answers, so there is no loss.")
        if logits.dim() != 3 or logits.shape[1] < batch.labels.shape[1]:
            raise UserError(
                f"The head gives logits of shape {list(logits.shape)}, expected [rows, tokens, words] for "
                f"{list(batch.labels.shape)} rows and tokens."
            )
        labels = batch.labels[:, 1:]
        before = logits[:, -batch.labels.shape[1] : -1]  # soft prompts stand in front
        learnt = labels != IGNORED
        picked, right = before[learnt], labels[learnt]
        losses = F.cross_entropy(picked.float(), right, reduction="none")
        table = losses.new_zeros(labels.shape).masked_scatter(learnt, losses)
        hits = torch.zeros_like(learnt).masked_scatter(learnt, picked.argmax(-1) == right)
        return table, hits

    def predict(self, logits: Tensor, batch: Batch) -> list[dict[str, float]]:
        """{"loss": mean over the row's learnt tokens, "tokens": their number, "correct": guessed right}."""
        table, hits = self._token_losses(logits, batch)
        tokens = batch.units.to(table.device)
        means, right = table.sum(1) / tokens.clamp(min=1), hits.sum(1)
        columns = zip(means.tolist(), tokens.tolist(), right.tolist(), strict=True)
        return [{"loss": mean, "tokens": int(n), "correct": int(good)} for mean, n, good in columns]

    def metrics(self, predictions: Sequence[Any], rows: Sequence[Row]) -> dict[str, float]:
        """loss and token_accuracy over all learnt tokens, perplexity = exp(loss)."""
        if len(predictions) != len(rows) or not rows:
            raise UserError(f"{len(predictions)} predictions for {len(rows)} rows cannot be measured.")
        pairs = [
            (p["tokens"], p["correct"] if self.metric == "token_accuracy" else p["loss"]) for p in predictions
        ]
        found = {"loss": _mean_loss(predictions), "token_accuracy": _token_accuracy(predictions)}
        found["perplexity"] = _exp(found["loss"])
        measure = {"token_accuracy": _share, "perplexity": _mean_exp}.get(self.metric, _mean)
        low, high = interval(measure, pairs, pairs)
        return found | {f"{self.metric}_low": low, f"{self.metric}_high": high}

    def generate(self, model: Any, tokenizer: Any, rows: Sequence[Row], **options: Any) -> list[str]:
        """Greedy answers, one text per row, of at most `max_new_tokens` (512) tokens."""
        examples = self.encode(rows, tokenizer, labelled=False)
        wanted = int(options.pop("max_new_tokens", LENGTH))
        if self._positions is not None and examples:
            room = self._positions - max(e["length"] for e in examples)
            if room < 1:
                raise UserError(
                    f"The longest prompt fills all {self._positions} positions; lower max_length."
                )
            wanted = min(wanted, room)
        options["max_new_tokens"] = wanted
        return generate(model, tokenizer, examples, self, **options)

    def generation_metrics(self, generated: Sequence[str], rows: Sequence[Row]) -> dict[str, float]:
        """exact_match (of what stands after "####" where the answer has it) or one's own metric, and its interval."""
        answers = [str(answer) for answer in self.references(generated, rows)]
        name, function = self.generated_metric or "exact_match", self.custom or exact_match
        low, high = interval(function, generated, answers, fast=False)
        return {name: float(function(generated, answers)), f"{name}_low": low, f"{name}_high": high}

    def describe(self) -> dict[str, Any]:
        named = None if self.custom else self.generated_metric or self.metric
        custom = self.generated_metric if self.custom else None
        return super().describe() | {"chat": self.chat, "metric": named, "custom_metric": custom}

    @classmethod
    def options(cls, described: dict[str, Any]) -> dict[str, Any]:
        return super().options(described) | {"chat": described.get("chat")}


def _dialogue(row: Row, column: str, tokenizer: Any, labelled: bool) -> list[Piece]:
    where = f'Row {row.get("id")}: "{column}"'
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f"{where} holds messages, and the tokenizer has no chat template to write them with.")
    messages = row[column]
    if labelled:
        return conversation(messages, tokenizer, where)
    while messages and messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    if not messages:
        raise UserError(f"{where} has no message to answer.")
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return [Piece(str(text), False)]


def _mean_loss(predictions: Sequence[dict[str, float]]) -> float:
    return sum(p["loss"] * p["tokens"] for p in predictions) / sum(p["tokens"] for p in predictions)


def _token_accuracy(predictions: Sequence[dict[str, float]]) -> float:
    return sum(p["correct"] for p in predictions) / sum(p["tokens"] for p in predictions)


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # beyond this a float overflows


def _mean(pairs: Any, _: Any) -> float:
    return float((pairs[:, 0] * pairs[:, 1]).sum() / pairs[:, 0].sum())


def _share(pairs: Any, _: Any) -> float:
    return float(pairs[:, 1].sum() / pairs[:, 0].sum())


def _mean_exp(pairs: Any, _: Any) -> float:
    return _exp(_mean(pairs, pairs))
