"""Tasks: how rows become batches, how outputs are read, the base loss and the metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from tunewise.core.errors import UserError, did_you_mean
from tunewise.data import Columns
from tunewise.task.text import encode_for, pad_rows

if TYPE_CHECKING:
    from tunewise.head import Head

__all__ = ["Batch", "CustomMetric", "Example", "Row", "Task"]

Row = dict[str, Any]
Example = dict[str, Any]
CustomMetric = Callable[[list[Any], list[Any]], float]
LENGTH = 512
# These number their positions from the padding id on, so fewer tokens fit than the table has rows.
OFFSET_POSITIONS = frozenset(
    ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer", "data2vec-text")
)
# Tokenizers without a limit say 1e30.
NO_LIMIT = 10**9


@dataclass
class Batch:
    """Collated rows: `inputs` for `model(**inputs)`, `labels` (None without answers), ids, units `[rows]`."""

    inputs: dict[str, Tensor]
    labels: Tensor | None
    ids: list[str]
    units: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        inputs = {name: value.to(device) for name, value in self.inputs.items()}
        labels = None if self.labels is None else self.labels.to(device)
        return Batch(inputs, labels, self.ids, self.units.to(device))


class Task:
    """Rows -> examples -> batches, and logits -> losses, predictions, metrics.

    columns     which columns hold text and answer
    max_length  tokens per row; None means the model's limit, at most 512; longer rows are cut and counted
    metric      a name in `scores`, or a callable (predictions, references) -> float
    notes       sentences to show the user
    Raises `UserError` for an unknown metric.
    """

    name: ClassVar[str] = ""
    scores: ClassVar[dict[str, bool]] = {}
    needs_tokenizer: ClassVar[bool] = True
    outputs: int | None = None

    def __init__(
        self,
        columns: Columns,
        *,
        max_length: int | None = None,
        metric: str | CustomMetric | None = None,
        higher_is_better: bool = True,
    ) -> None:
        if max_length is not None and max_length < 1:
            raise UserError(f"max_length={max_length} does not suit any model: expected at least 1 token.")
        self.columns, self.max_length, self.notes = columns, max_length, list[str]()
        self.position_limit: int | None = None
        self.pad_side: str | None = None
        self.position_ids = False
        self.custom: CustomMetric | None = None
        if callable(metric):
            self.custom, self.metric = metric, getattr(metric, "__name__", "custom")
            self.higher_is_better = higher_is_better
        else:
            self.metric = metric or next(iter(self.scores))
            if self.metric not in self.scores:
                raise UserError(
                    f'The task {self.name} has no metric "{metric}"{did_you_mean(self.metric, self.scores)}'
                )
            self.higher_is_better = self.scores[self.metric]

    def fit(self, rows: Sequence[Row]) -> None:
        """Learns what the training rows tell: label names, the scale of a target."""

    def default_head(self, config: Any = None) -> Head:
        """The head that is used when the recipe names none."""
        raise NotImplementedError

    def bind(self, config: Any) -> None:
        """Learns from a model's configuration how many positions it has, unless the head has measured it."""
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        count = getattr(config, "max_position_embeddings", None)
        relative = getattr(config, "position_biased_input", True) is False
        if self.position_limit is not None or relative or not isinstance(count, int) or count < 1:
            return
        offset = (getattr(config, "pad_token_id", None) or 0) + 1
        self.position_limit = (
            count - offset if getattr(config, "model_type", "") in OFFSET_POSITIONS else count
        )

    def encode(
        self, rows: Sequence[Row], tokenizer: Any, head: Head | None = None, *, labelled: bool = True
    ) -> list[Example]:
        """Examples with id, input_ids, labels (None if not `labelled`) and length, in the order of `rows`."""
        if tokenizer is None:
            raise UserError(f"The task {self.name} needs a tokenizer, and this model comes without one.")
        if not hasattr(tokenizer, "model_max_length"):
            raise UserError(f"The task {self.name} reads text, and this model looks at images.")
        limit = self.limit(tokenizer)
        texts = [tuple(self.text_of(row, column) for column in self.columns.text) for row in rows]
        encoded, cut = encode_for(head, texts, tokenizer, limit)
        self.note_cut(cut, len(rows), limit)
        return [
            {
                "id": str(row["id"]),
                **found,
                "labels": self.label_of(row) if labelled else None,
                "length": len(found["input_ids"]),
            }
            for row, found in zip(rows, encoded, strict=True)
        ]

    def collate(self, examples: Sequence[Example], tokenizer: Any, pad_side: str | None = None) -> Batch:
        """Examples -> one batch; what is padding is said by the attention mask alone (pad may equal eos)."""
        side = pad_side or self.pad_side or tokenizer.padding_side
        if side not in ("left", "right"):
            raise UserError(f'pad_side="{side}" is not valid, expected left or right.')
        inputs = pad_rows(examples, tokenizer, side)
        if self.position_ids and side == "left":
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        labels, units = self.collate_labels(examples, side)
        return Batch(inputs, labels, [e["id"] for e in examples], units)

    def collate_labels(self, examples: Sequence[Example], side: str) -> tuple[Tensor | None, Tensor]:
        """(labels, supervised units per row); one label per row here."""
        units = torch.ones(len(examples))
        if any(e["labels"] is None for e in examples):
            return None, units
        return torch.tensor([e["labels"] for e in examples]), units

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """Summed loss of each row `[rows]`, in float32."""
        raise NotImplementedError

    def predict(self, logits: Tensor, batch: Batch) -> list[Any]:
        """One prediction per row."""
        raise NotImplementedError

    def metrics(self, predictions: Sequence[Any], rows: Sequence[Row | Example]) -> dict[str, float]:
        """Scores against rows (or encoded examples), with `METRIC_low` and `METRIC_high` (95 %)."""
        raise NotImplementedError

    def label_of(self, row: Row) -> Any:
        """The encoded answer of a row."""
        raise NotImplementedError

    def text_of(self, row: Row, column: str) -> str:
        """The text in a column; an optional column may be empty."""
        value = row.get(column)
        if value is None or (isinstance(value, str) and not value.strip()):
            if column in self.columns.optional:
                return ""
            where = f'Row {row["id"]} has no text in the column "{column}"'
            raise UserError(
                f"{where}{'.' if column in row else did_you_mean(column, [k for k in row if k != 'id'])}"
            )
        if not isinstance(value, (str, int, float)):
            raise UserError(f'Row {row["id"]}: "{column}" holds {type(value).__name__}, expected text.')
        return str(value)

    def limit(self, tokenizer: Any) -> int:
        """Tokens per row, decided once; raises `UserError` when more is asked for than the model can take."""
        known = [
            n for n in (tokenizer.model_max_length, self.position_limit) if n is not None and n < NO_LIMIT
        ]
        if self.max_length is None:
            self.max_length = int(min([LENGTH, *known]))
        if self.max_length < 1 or (known and self.max_length > min(known)):
            most = f"from 1 to {int(min(known))}" if known else "at least 1"
            raise UserError(f"max_length={self.max_length} does not suit this model: expected {most} tokens.")
        return self.max_length

    def note_cut(self, count: int, rows: int, limit: int) -> None:
        """Says how many rows were cut."""
        if count:
            self.notes.append(
                f"{count:,} of {rows:,} rows were longer than {limit} tokens and cut (--max-length)."
            )

    def same_length(self, predictions: Sequence[Any], rows: Sequence[Any]) -> None:
        """Refuses predictions that do not belong to the rows, or none at all."""
        if len(predictions) != len(rows) or not rows:
            raise UserError(f"{len(predictions)} predictions for {len(rows)} rows cannot be measured.")

    def describe(self) -> dict[str, Any]:
        """JSON-ready; all that predicting and evaluating later need. Read by `Task.from_description`."""
        columns = {
            "text": list(self.columns.text),
            "label": self.columns.label,
            "optional": list(self.columns.optional),
        }
        return {
            "task": self.name,
            "columns": columns,
            "max_length": self.max_length,
            "metric": None if self.custom else self.metric,
            "pad_side": self.pad_side,
            "position_ids": self.position_ids,
            "position_limit": self.position_limit,
            "learnt": self.learnt(),
            "custom_metric": self.custom and getattr(self.custom, "__name__", "custom"),
        }

    def learnt(self) -> dict[str, Any]:
        """What `fit` found, as attributes, and options of the subclass."""
        return {}

    @staticmethod
    def from_description(described: dict[str, Any]) -> Task:
        """The task that `describe` described; a custom metric comes back as the task's usual one."""
        from tunewise.task import make_task

        given = described["columns"]
        columns = Columns(
            tuple(given["text"]), given["label"], described["task"], [], tuple(given["optional"])
        )
        task = make_task(
            described["task"], columns, max_length=described["max_length"], metric=described["metric"]
        )
        for name in ("pad_side", "position_ids", "position_limit"):
            setattr(task, name, described[name])
        for name, value in described["learnt"].items():
            setattr(task, name, value)
        if described.get("custom_metric"):
            task.notes.append(
                f"The metric {described['custom_metric']} is a function and was not saved: pass it again; "
                f"{task.metric} is used now."
            )
        return task
