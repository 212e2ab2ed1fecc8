from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.task.tiny import tiny_tokenizer
from tunewise.core.errors import UserError
from tunewise.data import Columns
from tunewise.task import Task, make_task

COLUMNS = Columns(("text",), "score", "regression")
ROWS: list[dict[str, Any]] = [
    {"id": "a", "text": "good", "score": 4.0},
    {"id": "b", "text": "bad film", "score": "1"},
    {"id": "c", "text": "fine", "score": 1},
]


def test_labels_are_standardised_and_predictions_are_in_the_unit_of_the_data() -> None:
    task: Any = make_task(None, COLUMNS)
    task.fit(ROWS)
    assert (task.mean, task.std) == (2.0, pytest.approx(2**0.5))
    tokenizer = tiny_tokenizer(bert=True)
    batch = task.collate(task.encode(ROWS, tokenizer), tokenizer)
    assert batch.labels.mean().abs() < 1e-6 and batch.units.tolist() == [1, 1, 1]
    logits = batch.labels.clone().unsqueeze(1)
    assert task.losses(logits, batch).tolist() == [0, 0, 0]
    assert task.losses(logits + 2, batch).tolist() == pytest.approx([4, 4, 4])
    assert task.predict(logits, batch) == pytest.approx([4, 1, 1])
    assert task.metric == "rmse" and not task.higher_is_better


def test_metrics_and_description() -> None:
    task: Any = make_task("regression", COLUMNS, metric="pearson")
    task.fit(ROWS)
    found = task.metrics([3.0, 1.0, 2.0], ROWS)
    assert found["rmse"] == pytest.approx((2 / 3) ** 0.5) and found["mae"] == pytest.approx(2 / 3)
    assert found["pearson_low"] <= found["pearson"] <= found["pearson_high"] and task.higher_is_better
    assert found == task.metrics([3.0, 1.0, 2.0], task.encode(ROWS, tiny_tokenizer(bert=True)))
    again: Any = Task.from_description(task.describe())
    assert again.describe() == task.describe() and again.std == task.std


@pytest.mark.parametrize("value", [None, "many", float("nan"), float("inf"), True, [1]])
def test_what_is_no_number_is_refused_by_row(value: Any) -> None:
    with pytest.raises(UserError, match='Row x has .* in the column "score", expected a number'):
        make_task("regression", COLUMNS).fit([*ROWS, {"id": "x", "text": "a", "score": value}])


def test_equal_labels_and_wide_logits_are_refused() -> None:
    task = make_task("regression", COLUMNS)
    with pytest.raises(UserError, match="nothing to learn"):
        task.fit(ROWS[:1])
    task.fit(ROWS)
    tokenizer = tiny_tokenizer(bert=True)
    with pytest.raises(UserError, match=r"expected \[rows, 1\]"):
        task.losses(torch.zeros(3, 2), task.collate(task.encode(ROWS, tokenizer), tokenizer))
