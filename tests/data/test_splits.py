"""Splits by hash: stable, without straddling, stratified, the same in every process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from tunewise.core.errors import UserError
from tunewise.data import Columns, Rows, read_rows, split_rows
from tunewise.data.splits import normalised_text

COLUMNS = Columns(("text",), "label", "classification")


def make(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"text": f"Text {i}", "label": "ab"[i % 3 == 0], "group": i // 4} for i in range(start, start + count)
    ]


def places(rows: list[dict[str, Any]], **options: Any) -> dict[str, str]:
    return {row["text"]: name for name, part in split_rows(rows, COLUMNS, **options).items() for row in part}


def test_added_rows_move_none_and_no_row_is_lost() -> None:
    before, after = places(make(2000)), places(make(2000, 1000) + make(1000))
    assert len(before) == 2000
    assert all(after[text] == name for text, name in before.items() if text in after)


def test_shares_hold_in_every_class() -> None:
    splits = split_rows(make(6000), COLUMNS, valid=0.1, test=0.2)
    whole = Counter(row["label"] for row in make(6000))
    for name, share in (("train", 0.7), ("valid", 0.1), ("test", 0.2)):
        counts = Counter(row["label"] for row in splits[name])
        assert all(abs(counts[label] / whole[label] - share) < 0.025 for label in whole)


def test_duplicates_never_straddle() -> None:
    rows = [
        {"text": t.format(i), "label": "ab"[k % 2]}
        for i in range(500)
        for k, t in enumerate(("Same text {}", "same  TEXT {}", " same\ttext {}\n"))
    ]
    for options in ({}, {"fixed": (900, 300)}):
        found: dict[str, set[str]] = {}
        for name, part in split_rows(rows, COLUMNS, **options).items():
            for row in part:
                found.setdefault(normalised_text(row, COLUMNS), set()).add(name)
        assert len(found) == 500 and all(len(names) == 1 for names in found.values())


def test_groups_never_straddle_even_through_a_shared_text() -> None:
    rows = make(2000)
    rows[0]["text"] = rows[1999]["text"]
    splits = split_rows(rows, COLUMNS, group_column="group")
    found: dict[int, set[str]] = {}
    for name, part in splits.items():
        for row in part:
            found.setdefault(row["group"], set()).add(name)
    assert all(len(names) == 1 for names in found.values()) and found[0] == found[499]
    assert sum(len(part) for _, part in splits.items()) == 2000 and splits.valid and splits.test


def test_fixed_counts_are_exact_and_proportional() -> None:
    splits = split_rows(make(1000), COLUMNS, fixed=(500, 100))
    assert [len(splits[name]) for name in ("train", "valid", "test")] == [500, 100, 400]
    whole = Counter(row["label"] for row in make(1000))
    counts = Counter(row["label"] for row in splits.train)
    assert all(abs(counts[label] - whole[label] / 2) <= 1 for label in whole)


def test_reviews_come_with_their_fixed_splits() -> None:
    rows = read_rows("reviews")
    splits = split_rows(rows, COLUMNS)
    assert [len(splits[name]) for name in ("train", "valid", "test")] == [2000, 500, 7572]
    texts = {name: {normalised_text(row, COLUMNS) for row in part} for name, part in splits.items()}
    assert not texts["train"] & texts["test"] and not texts["train"] & texts["valid"]
    assert abs(len(split_rows(rows, COLUMNS, valid=0.2).valid) / 10_072 - 0.2) < 0.02


def test_seed_changes_and_process_does_not() -> None:
    code = (
        "from tunewise.data import Columns, split_rows;"
        "rows = [{'text': f'Text {i}', 'label': 'ab'[i % 2]} for i in range(300)];"
        "s = split_rows(rows, Columns(('text',), 'label', 'classification'));"
        "print([r['text'] for r in s.valid + s.test])"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1] and len(runs[0]) > 100
    assert places(make(300)) != places(make(300), seed=1)


def test_sets_of_the_source_are_kept_and_shared_texts_are_said() -> None:
    train, test = make(400), make(50, 390)
    rows = read_rows({"train": train, "test": test})
    splits = split_rows(rows, COLUMNS, valid=0.25)
    assert len(splits.test) == 50 and len(splits.train) + len(splits.valid) == 400 and splits.valid
    notes = " ".join(splits.notes)
    assert "valid cut from its train rows" in notes and "also occur in train" in notes


def test_no_test_set_and_warnings() -> None:
    assert split_rows(make(300), COLUMNS, test=None).test == []
    assert any("the valid set is empty" in note for note in split_rows(make(2), COLUMNS, valid=1e-6).notes)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"valid": 0.6, "test": 0.4}, "nothing is left"),
        ({"valid": -0.1}, "expected a number from 0"),
        ({"fixed": (100, 100)}, "Asked for 100 train"),
        ({"group_column": "grup"}, 'did you mean "group"'),
    ],
)
def test_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        split_rows(make(50), COLUMNS, **options)
    with pytest.raises(UserError, match="no rows"):
        split_rows(Rows("x", []), COLUMNS)
