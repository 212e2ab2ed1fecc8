"""Columns and task: names first, then types; ambiguity is refused; every decision is noted."""

from __future__ import annotations

from typing import Any

import pytest

from tunewise.core.errors import UserError
from tunewise.data import detect_columns, read_rows, usable_rows

TEXT = [f"this is the sentence number {i} of the set" for i in range(30)]


def table(**columns: Any) -> list[dict[str, Any]]:
    """Columns given as value(i) or as lists -> 30 rows."""
    return [{n: c(i) if callable(c) else c[i] for n, c in columns.items()} for i in range(30)]


def yes_no(i: int) -> str:
    return ("no", "yes")[i % 2]


CASES = [
    (table(text=TEXT, label=yes_no), (("text",), "label", "classification")),
    (table(Text=TEXT, Label=lambda i: i % 3), (("Text",), "Label", "classification")),
    (table(review=TEXT, title=TEXT, rating=lambda i: i / 7), (("review",), "rating", "regression")),
    (table(text=TEXT, label=yes_no, rating=lambda i: i / 7), (("text",), "label", "classification")),
    (table(text=TEXT, label=lambda i: i), (("text",), "label", "regression")),
    (table(text=TEXT, label=lambda i: bool(i % 2)), (("text",), "label", "classification")),
    (table(text=TEXT, label=lambda i: float(i % 2)), (("text",), "label", "classification")),
    (
        table(sentence1=TEXT, sentence2=TEXT, label=yes_no),
        (("sentence1", "sentence2"), "label", "classification"),
    ),
    (
        table(premise=TEXT, hypothesis=TEXT, label=yes_no),
        (("premise", "hypothesis"), "label", "classification"),
    ),
    (table(prompt=TEXT, completion=TEXT), (("prompt",), "completion", "causal")),
    (table(question=TEXT, answer=TEXT, final=lambda i: i), (("question",), "answer", "causal")),
    (
        table(instruction=TEXT, input=lambda i: "", output=TEXT),
        (("instruction", "input"), "output", "causal"),
    ),
    (table(messages=lambda i: [{"role": "user", "content": "x"}]), (("messages",), None, "causal")),
    (table(remark=TEXT, code=lambda i: i, kind=yes_no), (("remark",), "kind", "classification")),
    (table(remark=TEXT, value=lambda i: i + 0.5), (("remark",), "value", "regression")),
]


@pytest.mark.parametrize(("rows", "expected"), CASES)
def test_detected(rows: list[dict[str, Any]], expected: tuple[Any, ...]) -> None:
    found = detect_columns(rows)
    assert (found.text, found.label, found.task) == expected
    notes = " ".join(found.notes)
    assert all(f'"{name}"' in notes for name in found.text)
    assert found.label is None or f'"{found.label}"' in notes


def test_given_columns_and_task() -> None:
    rows = table(text=TEXT, title=TEXT, label=yes_no, score=lambda i: i % 5)
    found = detect_columns(rows, text_column="title,text", label_column="score", task="regression")
    assert (found.text, found.label, found.task) == (("title", "text"), "score", "regression")
    assert found.notes[:2] == ['Text: "title" and "text" (as given).', 'Label: "score" (as given).']
    assert detect_columns(rows, task="regression").label == "score"
    assert detect_columns(rows, label_column="score").task == "classification"
    assert detect_columns(rows, task="causal").label is None
    assert detect_columns(rows, task="masked").text == ("text",)
    assert any("Not used: 2 columns (title, score)" in note for note in detect_columns(rows).notes)


REFUSED: list[tuple[list[dict[str, Any]], dict[str, Any], str]] = [
    (
        table(text=TEXT, label=yes_no),
        {"label_column": "lable"},
        'no column "lable" for the label; did you mean "label"',
    ),
    (table(text=TEXT, label=yes_no), {"text_column": "txt"}, 'did you mean "text"'),
    (table(text=TEXT, label=yes_no), {"text_column": "text", "label_column": "text"}, "both text and label"),
    (table(text=TEXT, label=lambda i: "x"), {}, "same value 'x' in all 30 rows"),
    (table(text=TEXT, label=yes_no, labels=yes_no), {}, 'columns "label" and "labels" are equally good'),
    (table(remark=TEXT, kind=yes_no, flag=yes_no), {}, 'columns "kind" and "flag" could be the label'),
    (table(remark=TEXT, note=TEXT, label=yes_no), {}, 'columns "remark" and "note" could both be the text'),
    (table(text=TEXT), {}, "only the column"),
    (table(number=lambda i: i, label=yes_no), {}, "No column holds free text"),
    (table(text=TEXT, label=TEXT), {}, "too many for classes"),
    (table(text=TEXT, label=yes_no), {"task": "regression"}, "No column looks like a label"),
    (table(text=TEXT, label=yes_no), {"task": "regression", "label_column": "label"}, "needs numbers"),
    (table(prompt=TEXT, completion=TEXT, label=yes_no), {}, "pass --task causal"),
    (table(text=TEXT, label=lambda i: None), {}, "is empty in every row"),
    (table(text=TEXT, label=lambda i: [i]), {}, "holds lists"),
    ([], {}, "no rows"),
]


@pytest.mark.parametrize(("rows", "options", "sentence"), REFUSED)
def test_refused(rows: list[dict[str, Any]], options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        detect_columns(rows, **options)
    assert sentence in str(refused.value)


def test_rows_without_text_or_label() -> None:
    given = [
        *table(text=TEXT, label=yes_no),
        {"text": " ", "label": "no"},
        {"text": "x", "label": None},
        {"text": "y"},
    ]
    rows = read_rows(given)
    columns = detect_columns(rows)
    with pytest.raises(UserError, match='3 rows of 33 .*row 31: no "text", row 32: no "label", row 33'):
        usable_rows(rows, columns)
    left = usable_rows(rows, columns, skip_bad_rows=True)
    assert len(left) == 30 and "Skipped 3 rows" in left.notes[-1] and len(rows) == 33
    assert usable_rows(left, columns) is left


def test_sets_lose_their_bad_rows_too() -> None:
    part = table(text=TEXT, label=yes_no)
    rows = read_rows({"train": part, "test": [*part, {"text": "x", "label": None}]})
    left = usable_rows(rows, detect_columns(rows), skip_bad_rows=True)
    assert left.splits is not None and len(left.splits["test"]) == 30 and "test row 31" in left.notes[-1]
    unlabelled = read_rows({"train": part, "test": [{"text": "x", "label": None}]})
    with pytest.raises(UserError, match="all 1 test rows lack"):
        usable_rows(unlabelled, detect_columns(unlabelled), skip_bad_rows=True)


def test_an_optional_input_may_be_empty() -> None:
    rows = read_rows(table(instruction=TEXT, input=lambda i: "", output=TEXT))
    assert len(usable_rows(rows, detect_columns(rows))) == 30
