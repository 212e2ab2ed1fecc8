"""A task says how rows become batches, and logits losses, predictions and metrics."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tunewise.core.errors import UserError, did_you_mean
from tunewise.data import Columns

from .metrics import interval

__all__ = ["Batch", "Example", "Metric", "Row", "Task"]

Row = dict[str, Any]
Example = dict[str, Any]
Metric = Callable[[Sequence[Any], Sequence[Any]], float]

LENGTH = 512
# These number their positions from the padding id on, so that many fewer tokens fit than the table has rows.
OFFSET_POSITIONS = frozenset(
    ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer", "data2vec-text")
)


@dataclass
class Batch:
    """Model inputs `[rows, tokens]`, labels (or None), row ids, supervised units of each row `[rows]`."""

    inputs: dict[str, Tensor]
    labels: Tensor | None
    ids: list[str]
    units: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        labels = None if self.labels is None else self.labels.to(device)
        return Batch(inputs, labels, self.ids, self.units.to(device))


class Task(ABC):
    """Rows -> examples -> batches; logits -> per-row losses, predictions, metrics.

    columns           which columns of a row are text and label
    max_length        most tokens of one row; None: what tokenizer and model allow, at most 512
    metric            a name from `known`, or a function (predictions, references) -> float
    higher_is_better  needed only for a metric of one's own where less is better
    `notes` collects sentences that the user should see, such as how many rows were cut.
    """

    name: ClassVar[str] = ""
    known: ClassVar[dict[str, bool]] = {}

    def __init__(
        self,
        columns: Columns,
        *,
        max_length: int | None = None,
        metric: str | Metric | None = None,
        higher_is_better: bool | None = None,
    ) -> None:
        if max_length is not None and (isinstance(max_length, bool) or max_length < 1):
            raise UserError(f"max_length={max_length!r} is not valid, expected a whole number from 1 on.")
        self.columns, self.max_length, self.notes = columns, max_length, list[str]()
        self.custom = metric if callable(metric) else None
        self.metric = self._metric_name(metric)
        default = self.custom is not None or self.known[self.metric]
        self.higher_is_better = default if higher_is_better is None else higher_is_better
        self._positions: int | None = None

    def _metric_name(self, metric: str | Metric | None) -> str:
        if metric is None:
            return next(iter(self.known))
        if not isinstance(metric, str):
            return getattr(metric, "__name__", type(metric).__name__)
        if metric not in self.known:
            raise UserError(
                f'The task {self.name} has no metric "{metric}"{did_you_mean(metric, self.known)}'
            )
        return metric

    @abstractmethod
    def fit(self, rows: Sequence[Row]) -> None:
        """Learns label names or scales from the training rows."""

    @abstractmethod
    def default_head(self, config: Any = None) -> Any:
        """The head that reads this task's answer from an ordinary model."""

    @abstractmethod
    def encode(
        self, rows: Sequence[Row], tokenizer: Any, head: Any = None, *, labelled: bool = True
    ) -> list[Example]:
        """Rows as token ids with id, labels, length, reference; `labelled=False` for rows to predict."""

    @abstractmethod
    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """Summed loss of each row over its supervised units, `[rows]` in float32."""

    @abstractmethod
    def predict(self, logits: Tensor, batch: Batch) -> list[Any]:
        """One JSON-ready prediction per row."""

    @abstractmethod
    def metrics(self, predictions: Sequence[Any], rows: Sequence[Row]) -> dict[str, float]:
        """All metrics and the 95 % interval of the main one; rows may be raw or encoded."""

    def bind(self, config: Any) -> None:
        """Learns how many positions the model has; UserError if `max_length` asks for more."""
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        positions = getattr(config, "max_position_embeddings", None)
        relative = getattr(config, "position_biased_input", True) is False
        if relative or not isinstance(positions, int) or positions < 1:
            return
        if getattr(config, "model_type", "") in OFFSET_POSITIONS:
            positions -= (getattr(config, "pad_token_id", None) or 0) + 1
        if self.max_length is not None and self.max_length > positions:
            raise UserError(
                f"max_length={self.max_length} is more than the {positions} tokens that the model reads."
            )
        self._positions = positions

    def limit(self, tokenizer: Any) -> int:
        """The most tokens of one row."""
        if self.max_length is not None:
            return self.max_length
        most = getattr(tokenizer, "model_max_length", None)
        return int(min(LENGTH, most or LENGTH, self._positions or LENGTH))

    def collate(self, examples: Sequence[Example], tokenizer: Any, pad_side: str | None = None) -> Batch:
        """Pads to the longest example, on the "right" by default: absolute positions stay."""
        if pad_side not in (None, "left", "right"):
            raise UserError(f'pad_side="{pad_side}" is not valid, expected left or right.')
        width, left = max(len(e["input_ids"]) for e in examples), pad_side == "left"
        fill: dict[str, int] = {
            "input_ids": _pad_id(tokenizer),
            "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0),
        }
        names: list[str] = [n for n in fill if n in examples[0]]
        inputs = {n: padded([e[n] for e in examples], width, fill[n], left) for n in names}
        inputs["attention_mask"] = padded([[1] * len(e["input_ids"]) for e in examples], width, 0, left)
        labels = None
        if all(e["labels"] is not None for e in examples):
            labels = self._labels(examples, width, left)
        return Batch(inputs, labels, [e["id"] for e in examples], self._units(examples))

    @abstractmethod
    def _labels(self, examples: Sequence[Example], width: int, left: bool) -> Tensor:
        """The labels of a batch as one tensor."""

    def _units(self, examples: Sequence[Example]) -> Tensor:
        return torch.tensor([float(e["labels"] is not None) for e in examples])

    def note_cut(self, cut: int, rows: int, limit: int, side: str) -> None:
        """Says how many rows were too long, if any."""
        if cut:
            self.notes.append(
                f"{cut:,} of {rows:,} rows were longer than {limit} tokens and lost their {side}."
            )

    def reference(self, row: Row) -> Any:
        """The right answer of a raw row; None where it has none."""
        return row.get(self.columns.label) if self.columns.label else None

    def references(self, predictions: Sequence[Any], rows: Sequence[Row]) -> list[Any]:
        """Right answers of raw or encoded rows; UserError where one is missing or the lengths differ."""
        if len(predictions) != len(rows) or not rows:
            raise UserError(f"{len(predictions)} predictions for {len(rows)} rows cannot be measured.")
        found = [row["reference"] if "input_ids" in row else self.reference(row) for row in rows]
        for row, answer in zip(rows, found, strict=True):
            if answer is None:
                raise UserError(f'Row {row.get("id")} has no "{self.columns.label}" to measure it against.')
        return found

    def measured(
        self, functions: dict[str, Metric], predictions: Sequence[Any], references: Sequence[Any]
    ) -> dict[str, float]:
        """Every metric, and the bootstrap interval of the main one unless `functions` lacks it."""
        if self.custom is not None:
            functions = {**functions, self.metric: self.custom}
        found = {name: float(function(predictions, references)) for name, function in functions.items()}
        if self.metric in functions:
            low, high = interval(functions[self.metric], predictions, references, fast=self.custom is None)
            found |= {f"{self.metric}_low": low, f"{self.metric}_high": high}
        return found

    def describe(self) -> dict[str, Any]:
        """All that `Task.from_description` needs to predict and measure again, JSON-ready."""
        columns = self.columns
        return {
            "task": self.name,
            "columns": {
                "text": list(columns.text),
                "label": columns.label,
                "optional": list(columns.optional),
            },
            "max_length": self.max_length,
            "positions": self._positions,
            "metric": None if self.custom else self.metric,
            "custom_metric": self.metric if self.custom else None,
        }

    def restore(self, described: dict[str, Any]) -> None:
        """Takes what `describe` gave, beyond the constructor's options."""
        self._positions = described.get("positions")
        if described.get("custom_metric"):
            self.notes.append(
                f"The run was measured by {described['custom_metric']}, a function that is not saved: "
                f"pass it again as the metric; {self.metric} is used now."
            )

    @classmethod
    def options(cls, described: dict[str, Any]) -> dict[str, Any]:
        """The constructor's options in a description."""
        return {"max_length": described.get("max_length"), "metric": described.get("metric")}

    @staticmethod
    def from_description(described: dict[str, Any]) -> Task:
        """The task that `describe` described."""
        from . import task_class

        cls, columns = task_class(str(described.get("task"))), described["columns"]
        found = Columns(
            tuple(columns["text"]), columns["label"], cls.name, optional=tuple(columns.get("optional", ()))
        )
        task = cls(found, **cls.options(described))
        task.restore(described)
        return task


def padded(rows: Sequence[Sequence[int]], width: int, fill: int, left: bool) -> Tensor:
    """`[rows, width]` of int64."""
    table = torch.full((len(rows), width), fill, dtype=torch.long)
    for i, row in enumerate(rows):
        table[i, slice(width - len(row), width) if left else slice(len(row))] = torch.tensor(
            row, dtype=torch.long
        )
    return table


def _pad_id(tokenizer: Any) -> int:
    """Any id will do, since the attention mask alone says what is padding."""
    for name in ("pad_token_id", "eos_token_id"):
        found = getattr(tokenizer, name, None)
        if isinstance(found, int):
            return found
    return 0


def finite(value: Any) -> float | None:
    """The value as a finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
