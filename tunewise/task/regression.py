"""Regression: one number per text or pair of texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from tunewise.core.errors import UserError

from .base import Batch, Example, Row, Task, finite
from .metrics import REGRESSION
from .text import encode_texts

__all__ = ["Regression"]


class Regression(Task):
    """loss = (logit - (y - mean) / std)^2 with mean and std of the training rows; logits `[rows, 1]`.

    Predictions and metrics are in the unit of the data. `standardize=False` keeps mean 0 and std 1.
    Raises `UserError` for labels that are no finite numbers or all equal.
    """

    name: ClassVar[str] = "regression"
    known: ClassVar[dict[str, bool]] = {name: name not in ("rmse", "mae") for name in REGRESSION}

    def __init__(self, columns: Any, *, standardize: bool = True, **options: Any) -> None:
        super().__init__(columns, **options)
        self.standardize, self.mean, self.std = standardize, 0.0, 1.0

    def fit(self, rows: Sequence[Row]) -> None:
        """Learns mean and standard deviation."""
        values = [self._number(row) for row in rows]
        if len(set(values)) < 2:
            raise UserError(
                f'The label column "{self.columns.label}" is the same in all {len(rows)} training rows.'
            )
        if self.standardize:
            self.mean = math.fsum(values) / len(values)
            self.std = math.sqrt(math.fsum((v - self.mean) ** 2 for v in values) / len(values))

    def _number(self, row: Row) -> float:
        value = row.get(str(self.columns.label))
        number = finite(value)
        if number is None:
            raise UserError(
                f'Row {row.get("id")}: "{self.columns.label}" is {value!r}, expected a finite number.'
            )
        return number

    def default_head(self, config: Any = None) -> Any:
        """The model's own classification head with one output."""
        from tunewise.head import ClassHead

        return ClassHead()

    def encode(
        self, rows: Sequence[Row], tokenizer: Any, head: Any = None, *, labelled: bool = True
    ) -> list[Example]:
        """Token ids and the standardised label; texts cut at the end are counted in `notes`."""
        limit = self.limit(tokenizer)
        examples, cut = encode_texts(rows, self.columns.text, tokenizer, limit, head)
        for row, example in zip(rows, examples, strict=True):
            number = self._number(row) if labelled else None
            label = None if number is None else (number - self.mean) / self.std
            size = len(example["input_ids"])
            example |= {"id": row["id"], "labels": label, "reference": number, "length": size}
        self.note_cut(cut, len(rows), limit, "end")
        return examples

    def _labels(self, examples: Sequence[Example], width: int, left: bool) -> Tensor:
        return torch.tensor([e["labels"] for e in examples], dtype=torch.float32)

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """Squared error of each row, on the standardised scale."""
        if batch.labels is None:
            raise UserError(f"Row {batch.ids[0]} and its batch have no labels, so there is no loss.")
        return (_one(logits) - batch.labels) ** 2

    def predict(self, logits: Tensor, batch: Batch) -> list[float]:
        """Numbers in the unit of the data."""
        return [value * self.std + self.mean for value in _one(logits).tolist()]

    def reference(self, row: Row) -> float | None:
        """The label as a number."""
        return finite(row.get(str(self.columns.label)))

    def metrics(self, predictions: Sequence[Any], rows: Sequence[Row]) -> dict[str, float]:
        """rmse, mae, pearson, spearman, r2."""
        return self.measured(dict(REGRESSION), predictions, self.references(predictions, rows))

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"standardize": self.standardize, "mean": self.mean, "std": self.std}

    def restore(self, described: dict[str, Any]) -> None:
        super().restore(described)
        self.mean, self.std = float(described["mean"]), float(described["std"])

    @classmethod
    def options(cls, described: dict[str, Any]) -> dict[str, Any]:
        return super().options(described) | {"standardize": described.get("standardize", True)}


def _one(logits: Tensor) -> Tensor:
    if logits.dim() == 2 and logits.shape[1] != 1 or logits.dim() > 2:
        raise UserError(
            f"The head gives logits of shape {list(logits.shape)}, expected [rows, 1] for regression."
        )
    return logits.float().reshape(-1)
