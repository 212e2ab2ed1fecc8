"""l_i = (f_i - (y_i - mean) / std)^2: one number per row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor

from tunewise.core.errors import UserError
from tunewise.data import Columns
from tunewise.task.base import Batch, CustomMetric, Example, Row, Task
from tunewise.task.metrics import bootstrap, custom_score, regression_scores

if TYPE_CHECKING:
    from tunewise.head import Head

__all__ = ["Regression"]


class Regression(Task):
    """Squared error of the standardised target; predictions and metrics are in the units of the data."""

    name: ClassVar[str] = "regression"
    scores: ClassVar[dict[str, bool]] = {"rmse": False, "mae": False, "pearson": True, "spearman": True}
    outputs: int | None = 1

    def __init__(
        self,
        columns: Columns,
        *,
        max_length: int | None = None,
        metric: str | CustomMetric | None = None,
        higher_is_better: bool = True,
    ) -> None:
        super().__init__(columns, max_length=max_length, metric=metric, higher_is_better=higher_is_better)
        if columns.label is None:
            raise UserError("Regression needs a label column: choose one with --label-column.")
        self.mean, self.std = 0.0, 1.0

    def fit(self, rows: Sequence[Row]) -> None:
        values = np.array([self._number(row) for row in rows])
        self.mean, self.std = float(values.mean()), float(values.std())
        if self.std == 0.0:
            raise UserError(
                f"All {len(rows):,} training rows have the target {self.mean:g}: there is nothing to learn."
            )

    def _number(self, row: Row) -> float:
        value = row.get(str(self.columns.label))
        try:
            number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise UserError(
                f'Row {row["id"]} has {value!r} in the column "{self.columns.label}", expected a number.'
            )
        return number

    def label_of(self, row: Row) -> float:
        return (self._number(row) - self.mean) / self.std

    def default_head(self, config: Any = None) -> Head:
        from tunewise.head import ClassHead

        return ClassHead()

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        if batch.labels is None:
            raise UserError(f"Row {batch.ids[0]} and its batch have no labels, so there is no loss.")
        if logits.numel() != len(batch):
            raise UserError(
                f"The head gives logits of shape {list(logits.shape)}, expected [rows, 1] for regression."
            )
        return (logits.float().reshape(len(batch)) - batch.labels).square()

    def predict(self, logits: Tensor, batch: Batch) -> list[float]:
        values: list[float] = (logits.double().reshape(len(batch)) * self.std + self.mean).tolist()
        return values

    def metrics(self, predictions: Sequence[Any], rows: Sequence[Row | Example]) -> dict[str, float]:
        self.same_length(predictions, rows)
        truth = np.array(
            [
                row["labels"] * self.std + self.mean if "input_ids" in row else self._number(row)
                for row in rows
            ]
        )
        said = np.array(predictions, dtype=float)
        found = regression_scores(truth, said)
        if self.custom is not None:
            found[self.metric], low, high = custom_score(self.custom, said.tolist(), truth.tolist())
        else:
            low, high = bootstrap(len(truth), lambda i: regression_scores(truth[i], said[i])[self.metric])
        return {**found, f"{self.metric}_low": low, f"{self.metric}_high": high}

    def learnt(self) -> dict[str, Any]:
        return {"mean": self.mean, "std": self.std}
