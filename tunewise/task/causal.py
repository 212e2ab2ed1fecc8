"""l_i = sum_t -log p(token_t | earlier tokens), over the answer's tokens and its end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunewise.core.errors import UserError
from tunewise.data import Columns
from tunewise.task.base import Batch, CustomMetric, Example, Row, Task
from tunewise.task.chat import Message, Tokens, conversation, plain_answer, plain_text, prompt_ids
from tunewise.task.linear_loss import linear_cross_entropy
from tunewise.task.metrics import bootstrap
from tunewise.task.text import IGNORED, longest, pad_sequences

if TYPE_CHECKING:
    from tunewise.head import Head

__all__ = ["CausalLM"]


class CausalLM(Task):
    """Token cross-entropy on the answer and the end-of-turn (or eos) token after it, not on the prompt.

    With a chat template the prompt columns are the user's message and the answer the assistant's; of a column
    `messages` every assistant turn is learnt; without a template the row is "prompt, line break, answer".
    Without an answer column the whole text is learnt. Over-long prompts lose their left end inside the
    template, plain texts their right end, answers nothing.

    `exact_match` and metrics of one's own are scored on generated text (`generation_metrics`); while training
    the loss decides. Predictions are {"loss", "token_accuracy", "tokens"} per row.
    """

    name: ClassVar[str] = "causal"
    scores: ClassVar[dict[str, bool]] = {
        "loss": False,
        "perplexity": False,
        "token_accuracy": True,
        "exact_match": True,
    }

    def __init__(
        self,
        columns: Columns,
        *,
        max_length: int | None = None,
        metric: str | CustomMetric | None = None,
        higher_is_better: bool = True,
        chat: bool | None = None,
    ) -> None:
        super().__init__(columns, max_length=max_length, metric=metric, higher_is_better=higher_is_better)
        self.chat = chat
        self.generation_metric: str | None = None
        if self.custom is not None or self.metric == "exact_match":
            self.generation_metric, self.metric, self.higher_is_better = self.metric, "loss", False

    @property
    def is_conversation(self) -> bool:
        """Whether a column holds chat messages."""
        return self.columns.label is None and self.columns.text == ("messages",)

    def default_head(self, config: Any = None) -> Head:
        from tunewise.head import LMHead

        return LMHead()

    def encode(
        self, rows: Sequence[Row], tokenizer: Any, head: Head | None = None, *, labelled: bool = True
    ) -> list[Example]:
        self._check(tokenizer)
        limit, cut, lost, examples = self.limit(tokenizer), 0, 0, []
        for row in rows:
            made = self._made(row, tokenizer, labelled)
            lost += made.lost_turns
            if len(made.ids) > limit:
                made, cut = self._cut(made, limit, row, tokenizer, labelled), cut + 1
            labels = [i if learnt else IGNORED for i, learnt in zip(made.ids, made.learnt, strict=True)]
            labels[0] = IGNORED  # nothing stands before it to predict it from
            examples.append(
                {
                    "id": str(row["id"]),
                    "input_ids": made.ids,
                    "labels": labels if labelled else None,
                    "length": len(made.ids),
                }
            )
        self.note_cut(cut, len(rows), limit)
        if lost:
            self.notes.append(
                f"{lost:,} assistant turns are not learnt: the template rewrites earlier turns."
            )
        return examples

    def _check(self, tokenizer: Any) -> None:
        if tokenizer is None:
            raise UserError("The task causal needs a tokenizer, and this model comes without one.")
        if tokenizer.eos_token_id is None:
            raise UserError("The tokenizer has no end-of-text token, so a model could never learn to stop.")
        template = getattr(tokenizer, "chat_template", None)
        if self.chat is None:
            self.chat = template is not None
        if template is None and (self.chat or self.is_conversation):
            raise UserError(
                "The tokenizer has no chat template, which messages need: give prompt and answer."
            )

    def _made(self, row: Row, tokenizer: Any, labelled: bool, prompt: str | None = None) -> Tokens:
        if not labelled:
            return self._prompt(row, tokenizer, prompt)
        if self.is_conversation:
            return conversation(self.messages(row), tokenizer, str(row["id"]))
        if self.columns.label is None:
            text = "\n".join(t for c in self.columns.text if (t := self.text_of(row, c)))
            return plain_text(text, tokenizer)
        answer = self.text_of(row, self.columns.label)
        if self.chat:
            both = [*self.messages(row, prompt), {"role": "assistant", "content": answer}]
            return conversation(both, tokenizer, str(row["id"]))
        return plain_answer(self.messages(row, prompt)[0]["content"], answer, tokenizer)

    def _prompt(self, row: Row, tokenizer: Any, prompt: str | None) -> Tokens:
        messages = self.messages(row, prompt)
        if self.columns.label is None and not self.is_conversation:
            made = plain_text(messages[0]["content"], tokenizer)
            return Tokens(made.ids[:-1], [False] * (len(made.ids) - 1))
        if self.is_conversation and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        ids = prompt_ids(messages, tokenizer, bool(self.chat), str(row["id"]))
        return Tokens(ids, [False] * len(ids))

    def messages(self, row: Row, prompt: str | None = None) -> list[Message]:
        """The chat of a row; prompt columns (or `prompt` in their place) make one message of the user."""
        if prompt is not None:
            return [{"role": "user", "content": prompt}]
        if not self.is_conversation:
            parts = [t for column in self.columns.text if (t := self.text_of(row, column))]
            return [{"role": "user", "content": "\n".join(parts)}]
        found = row.get("messages")
        chat = list(found) if isinstance(found, (list, tuple, np.ndarray)) else []
        if not chat or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in chat):
            raise UserError(f'Row {row["id"]}: "messages" is not a list of {{"role": ..., "content": ...}}.')
        return chat

    def _cut(self, made: Tokens, limit: int, row: Row, tokenizer: Any, labelled: bool) -> Tokens:
        """The row in `limit` tokens: prompts are cut inside their template, chats at their start."""
        if labelled and self.columns.label is None and not self.is_conversation:
            return Tokens(made.ids[:limit], made.learnt[:limit])
        answer = len(made.ids) - made.answer_start
        if self.columns.label is not None:
            whole = self.messages(row)[0]["content"]
            kept = longest(whole, limit, lambda t: len(self._made(row, tokenizer, labelled, t).ids), end=True)
            if kept:
                return self._made(row, tokenizer, labelled, kept)
        elif answer + 2 <= limit:
            made.cut_left(limit, tokenizer.bos_token_id)
            return made
        raise UserError(
            f"Row {row['id']}: its answer has {answer:,} tokens, which leaves no room for the prompt in "
            f"max_length={limit}; answers are never cut, so raise --max-length or leave the row out."
        )

    def collate_labels(self, examples: Sequence[Example], side: str) -> tuple[Tensor | None, Tensor]:
        if any(e["labels"] is None for e in examples):
            return None, torch.ones(len(examples))
        labels = pad_sequences([e["labels"] for e in examples], IGNORED, side)
        return labels, (labels != IGNORED).sum(1).float()

    def _supervised(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (float32) and targets of supervised positions alone: the whole table keeps its dtype."""
        chosen, targets, mask = self._chosen(logits, batch)
        return chosen.float(), targets, mask

    def _chosen(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Those of any values `[rows, tokens, ...]` that stand before a supervised token."""
        if batch.labels is None:
            raise UserError(
                f"Row {batch.ids[0]} and its batch have no answers to score; use generate for new ones."
            )
        if logits.dim() != 3 or logits.shape[1] < batch.labels.shape[1]:
            raise UserError(
                f"The head gives logits of shape {list(logits.shape)}, expected [rows, tokens, words] for "
                f"labels of shape {list(batch.labels.shape)}."
            )
        targets = batch.labels[:, 1:]
        mask = targets != IGNORED
        before = logits[:, -batch.labels.shape[1] : -1]  # soft prompts stand in front
        return before[mask], targets[mask], mask

    @staticmethod
    def _per_row(values: Tensor, mask: Tensor) -> Tensor:
        return values.new_zeros(mask.shape).masked_scatter(mask, values).sum(1)

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        chosen, targets, mask = self._supervised(logits, batch)
        return self._per_row(F.cross_entropy(chosen, targets, reduction="none"), mask)

    @property
    def reads_states(self) -> bool:
        """Whether `state_losses` computes what `losses` does."""
        return type(self).losses is CausalLM.losses

    def state_losses(self, hidden: Tensor, layer: nn.Linear, batch: Batch) -> Tensor:
        """`losses` of layer(hidden); hidden `[rows, tokens, width]`. Logits exist for some tokens at a time."""
        chosen, targets, mask = self._chosen(hidden, batch)
        return self._per_row(linear_cross_entropy(chosen, layer.weight, layer.bias, targets), mask)

    def predict(self, logits: Tensor, batch: Batch) -> list[dict[str, float]]:
        chosen, targets, mask = self._supervised(logits, batch)
        loss = self._per_row(F.cross_entropy(chosen, targets, reduction="none"), mask) / batch.units
        right = self._per_row((chosen.argmax(-1) == targets).float(), mask) / batch.units
        rows = zip(loss.tolist(), right.tolist(), batch.units.tolist(), strict=True)
        return [{"loss": a, "token_accuracy": b, "tokens": n} for a, b, n in rows]

    def metrics(self, predictions: Sequence[Any], rows: Sequence[Row | Example]) -> dict[str, float]:
        self.same_length(predictions, rows)
        tokens = np.array([p["tokens"] for p in predictions])
        sums = {k: np.array([p[k] for p in predictions]) * tokens for k in ("loss", "token_accuracy")}

        def mean(name: str, i: Any) -> float:
            return float(sums[name][i].sum() / tokens[i].sum())

        def perplexity(i: Any) -> float:
            return math.exp(min(mean("loss", i), 700.0))

        score: dict[str, Callable[[Any], float]] = {
            "loss": lambda i: mean("loss", i),
            "perplexity": perplexity,
            "token_accuracy": lambda i: mean("token_accuracy", i),
        }
        everything = np.arange(len(tokens))
        low, high = bootstrap(len(tokens), score[self.metric])
        found = {name: of(everything) for name, of in score.items()}
        return {**found, f"{self.metric}_low": low, f"{self.metric}_high": high}

    def references(self, rows: Sequence[Row]) -> list[str]:
        """The right answers as text."""
        if self.is_conversation:
            return [str(self.messages(row)[-1]["content"]) for row in rows]
        if self.columns.label is None:
            raise UserError(
                "Generated text is scored against an answer column: choose one with --label-column."
            )
        return [self.text_of(row, self.columns.label) for row in rows]

    def learnt(self) -> dict[str, Any]:
        return {"chat": self.chat, "generation_metric": None if self.custom else self.generation_metric}
