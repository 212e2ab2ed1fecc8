"""Classification: one of the labels that the training rows have, for one text or a pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from tunewise.core.errors import UserError, did_you_mean
from tunewise.data.labels import is_missing

from .base import Batch, Example, Row, Task
from .metrics import CLASSIFICATION
from .text import encode_texts

__all__ = ["Classification", "label_name"]


class Classification(Task):
    """loss = -log softmax(logits)[label]; logits `[rows, classes]`, predictions are label names.

    Label names are sorted, whole numbers by value. Raises `UserError` for one that training rows lack.
    """

    name: ClassVar[str] = "classification"
    known: ClassVar[dict[str, bool]] = dict.fromkeys(CLASSIFICATION, True)

    def __init__(self, columns: Any, **options: Any) -> None:
        super().__init__(columns, **options)
        self.labels: list[str] = []

    def fit(self, rows: Sequence[Row]) -> None:
        """Learns the label names."""
        names = {self._label(row) for row in rows}
        if len(names) < 2:
            raise UserError(
                f'The label column "{self.columns.label}" has {len(names)} distinct value in the {len(rows)} '
                "training rows, and classification needs two at least."
            )
        self.labels = sorted(names, key=_order(names))

    def _label(self, row: Row) -> str:
        value = row.get(str(self.columns.label))
        if is_missing(value):
            raise UserError(f'Row {row.get("id")} has no label in the column "{self.columns.label}".')
        if not isinstance(value, (str, int, float)):
            raise UserError(
                f'Row {row.get("id")}: the label in "{self.columns.label}" is a {type(value).__name__}, '
                "expected one name or number."
            )
        return label_name(value)

    def default_head(self, config: Any = None) -> Any:
        """The model's own classification head."""
        from tunewise.head import ClassHead

        return ClassHead()

    def encode(
        self, rows: Sequence[Row], tokenizer: Any, head: Any = None, *, labelled: bool = True
    ) -> list[Example]:
        """Token ids and the label's position in `labels`; texts cut at the end are counted in `notes`."""
        self._fitted()
        limit = self.limit(tokenizer)
        examples, cut = encode_texts(rows, self.columns.text, tokenizer, limit, head)
        for row, example in zip(rows, examples, strict=True):
            name = self._known_label(row) if labelled else None
            label = None if name is None else self.labels.index(name)
            size = len(example["input_ids"])
            example |= {"id": row["id"], "labels": label, "reference": name, "length": size}
        self.note_cut(cut, len(rows), limit, "end")
        return examples

    def _known_label(self, row: Row) -> str:
        name = self._label(row)
        if name not in self.labels:
            raise UserError(
                f'Row {row.get("id")} has the label "{name}", which no training row has'
                f"{did_you_mean(name, self.labels)}"
            )
        return name

    def _fitted(self) -> None:
        if not self.labels:
            raise UserError("The task does not know its labels yet: fit it on the training rows first.")

    def _labels(self, examples: Sequence[Example], width: int, left: bool) -> Tensor:
        return torch.tensor([e["labels"] for e in examples], dtype=torch.long)

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of each row."""
        self._check(logits)
        if batch.labels is None:
            raise UserError(f"Row {batch.ids[0]} and its batch have no labels, so there is no loss.")
        return F.cross_entropy(logits.float(), batch.labels, reduction="none")

    def predict(self, logits: Tensor, batch: Batch) -> list[str]:
        """The most probable label of each row."""
        self._check(logits)
        return [self.labels[i] for i in logits.argmax(-1).tolist()]

    def scores(self, logits: Tensor) -> list[dict[str, float]]:
        """The probability of every label, per row."""
        self._check(logits)
        return [dict(zip(self.labels, row, strict=True)) for row in logits.float().softmax(-1).tolist()]

    def _check(self, logits: Tensor) -> None:
        if logits.dim() != 2 or logits.shape[1] != len(self.labels):
            raise UserError(
                f"The head gives logits of shape {list(logits.shape)}, expected [rows, {len(self.labels)}] "
                "for the labels of this task."
            )

    def reference(self, row: Row) -> str | None:
        """The label's name."""
        value = row.get(str(self.columns.label))
        return None if is_missing(value) else label_name(value)

    def metrics(self, predictions: Sequence[Any], rows: Sequence[Row]) -> dict[str, float]:
        """accuracy, macro_f1, balanced_accuracy, matthews."""
        return self.measured(dict(CLASSIFICATION), predictions, self.references(predictions, rows))

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"labels": self.labels}

    def restore(self, described: dict[str, Any]) -> None:
        super().restore(described)
        self.labels = list(described["labels"])


def label_name(value: Any) -> str:
    """The name of a label: 1, 1.0 and "1" are one label, true and false are spelt so."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def _order(names: set[str]) -> Any:
    """By value if all are numbers, else by name."""

    def number(name: str) -> tuple[float, str]:
        return float(name), name

    try:
        for name in names:
            float(name)
    except ValueError:
        return str
    return number
