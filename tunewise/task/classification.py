"""l_i = -log softmax(logits_i)[label_i]: one label per row, of one text or a pair of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from tunewise.core.errors import UserError, did_you_mean
from tunewise.data import Columns
from tunewise.task.base import Batch, CustomMetric, Example, Row, Task
from tunewise.task.metrics import bootstrap_confusion, confusion, confusion_scores, custom_score, wilson

if TYPE_CHECKING:
    from tunewise.head import Head

__all__ = ["Classification", "label_name"]


def label_name(value: Any) -> str:
    """The name of a label: 1 and 1.0 are "1", True is "true", text is itself without outer white space."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _order(name: str) -> tuple[int, float, str]:
    try:
        return 0, float(name), name
    except ValueError:
        return 1, 0.0, name


class Classification(Task):
    """Cross-entropy over the label names of the training rows; predictions are label names."""

    name: ClassVar[str] = "classification"
    scores: ClassVar[dict[str, bool]] = dict.fromkeys(
        ("accuracy", "macro_f1", "balanced_accuracy", "matthews"), True
    )

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
            raise UserError("Classification needs a label column: choose one with --label-column.")
        self.labels: list[str] = []
        self.open_answers = False

    @property
    def outputs(self) -> int:  # type: ignore[override]
        """Number of classes."""
        return len(self.labels)

    def fit(self, rows: Sequence[Row]) -> None:
        names = {self._name(row) for row in rows}
        if len(names) < 2:
            raise UserError(
                f'All {len(rows):,} training rows are "{next(iter(names), "")}": two labels are needed.'
            )
        # Numbers in their own order when all are numbers; names in that of the alphabet.
        numbers = all(_order(name)[0] == 0 for name in names)
        self.labels = sorted(names, key=_order if numbers else None)

    def _name(self, row: Row) -> str:
        value = row.get(str(self.columns.label))
        if value is None or label_name(value) == "":
            raise UserError(f'Row {row["id"]} has no label in the column "{self.columns.label}".')
        return label_name(value)

    def label_of(self, row: Row) -> int:
        name = self._name(row)
        if name not in self.labels:
            raise UserError(
                f'Row {row["id"]} has the label "{name}", which no training row has'
                f"{did_you_mean(name, self.labels)}"
            )
        return self.labels.index(name)

    def default_head(self, config: Any = None) -> Head:
        from tunewise.head import ClassHead

        return ClassHead()

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        if batch.labels is None:
            raise UserError(f"Row {batch.ids[0]} and its batch have no labels, so there is no loss.")
        if self.open_answers:  # the last column stands for all other words
            logits = logits[:, :-1]
        if logits.dim() != 2 or logits.shape[1] != len(self.labels):
            raise UserError(
                f"The head gives logits of shape {list(logits.shape)}, expected [rows, {len(self.labels)}] "
                "for the labels of this task."
            )
        return F.cross_entropy(logits.float(), batch.labels, reduction="none")

    def predict(self, logits: Tensor, batch: Batch) -> list[str | None]:
        """Label names; None where the further column of `open_answers` is the largest."""
        return [[*self.labels, None][i] for i in logits.argmax(-1).tolist()]

    def metrics(self, predictions: Sequence[Any], rows: Sequence[Row | Example]) -> dict[str, float]:
        self.same_length(predictions, rows)
        truth = [self.truth_of(row) for row in rows]
        place: dict[str | None, int] = {name: i for i, name in enumerate([*self.labels, None])}
        said = [place[p] for p in predictions]
        table = confusion(truth, said, max(len(self.labels), max(said) + 1))
        found = confusion_scores(table)
        if self.custom is not None:
            references = [self.labels[i] for i in truth]
            found[self.metric], low, high = custom_score(self.custom, predictions, references)
        elif self.metric == "accuracy":
            low, high = wilson(float(table.trace()), len(truth))
        else:
            low, high = bootstrap_confusion(table, self.metric)
        return {**found, f"{self.metric}_low": low, f"{self.metric}_high": high}

    def truth_of(self, row: Row | Example) -> int:
        """The class of a row, or of an encoded example."""
        return int(row["labels"]) if "input_ids" in row else self.label_of(row)

    def learnt(self) -> dict[str, Any]:
        return {"labels": self.labels} | ({"open_answers": True} if self.open_answers else {})
