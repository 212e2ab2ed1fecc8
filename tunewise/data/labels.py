"""What the values of a column look like: free text, class labels or numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from tunewise.core.errors import UserError
from tunewise.data.table import Row, few, plural

__all__ = ["is_free_text", "is_missing", "label_task", "looks_like_label", "require_numbers"]

CLASSES_AT_MOST = 20
NAMES_AT_MOST = 200


def is_missing(value: Any) -> bool:
    """None, NaN, an empty list, or a string of white space."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or value == []


def _values(table: Sequence[Row], name: str) -> list[Any]:
    return [value for row in table if not is_missing(value := row.get(name))]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _distinct(values: Iterable[Any]) -> int:
    return len({str(value) for value in values})


def is_free_text(table: Sequence[Row], name: str, words: int) -> float:
    """Mean length in characters when the column is text of at least `words` words on average, else 0."""
    values = _values(table, name)
    if not values or not all(isinstance(value, str) for value in values):
        return 0.0
    if words > 1 and sum(len(value.split()) for value in values) < words * len(values):
        return 0.0
    if words > 1 and _distinct(values) * 2 < len(values):
        return 0.0
    return sum(map(len, values)) / len(values)


def looks_like_label(table: Sequence[Row], name: str, task: str | None) -> bool:
    """Two or more distinct values, few of them (or numbers, for regression), repeated in the rows."""
    values = _values(table, name)
    if not values or not all(isinstance(value, (str, int, float)) for value in values):
        return False
    count = _distinct(values)
    if task == "regression":
        return count > 1 and all(map(_is_number, values))
    few_values = 1 < count <= CLASSES_AT_MOST and (count * 2 <= len(values) or count == 2)
    numbers = all(isinstance(value, float) for value in values) and count > 1 and task is None
    return few_values or numbers


def label_task(values: Sequence[Any], name: str) -> tuple[str, str]:
    """("classification" | "regression", the reason) from the values of the label column."""
    count = _distinct(values)
    if all(isinstance(value, (list, dict)) for value in values):
        raise UserError(f'The label column "{name}" holds lists or objects: say what they are with --task.')
    if not all(map(_is_number, values)):
        if count > max(NAMES_AT_MOST, len(values) // 2) or count == len(values) > CLASSES_AT_MOST:
            raise UserError(
                f'The label column "{name}" has {count:,} distinct values in {plural(len(values), "row")}, too many '
                "for classes: choose another with --label-column, or pass --task."
            )
        return "classification", f"{count} classes: {few(sorted({str(value) for value in values}), 6)}"
    whole = all(float(value).is_integer() for value in values)
    if whole and count <= CLASSES_AT_MOST:
        return "classification", f"{count} distinct whole numbers"
    kind = f"{count:,} distinct numbers" if not whole else f"{count:,} distinct whole numbers, more than 20"
    return "regression", kind


def require_numbers(values: Sequence[Any], name: str) -> None:
    """UserError unless every label is a finite number."""
    wrong = [value for value in values if not _is_number(value) or math.isinf(value)]
    if wrong:
        raise UserError(
            f'The task regression needs numbers in the label column "{name}", found {few(map(repr, wrong), 3)}.'
        )
