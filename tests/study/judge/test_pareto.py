"""Dominance as an order, what missing values do, and the sentences."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tunewise.core.errors import UserError
from tunewise.study.judge.pareto import COSTS, as_good, dominated_by, dominates, front, known, quality

ACCURACY = quality("accuracy")
ALL = [ACCURACY, *COSTS]
KEYS = ("peak_memory_mb", "seconds", "trainable")
FEW = [ACCURACY, *(k for k in COSTS if k.key in KEYS)]

Row = dict[str, Any]


def tables(missing: float, number: int = 150) -> list[list[Row]]:
    """Random tables with many ties; with holes if asked."""
    make, made = np.random.default_rng(0), []
    for _ in range(number):
        rows: list[Row] = []
        for i in range(int(make.integers(1, 9))):
            row: Row = {"method": f"m{i}", "accuracy": float(make.integers(0, 4)) / 4}
            row |= {key: float(make.integers(0, 4)) for key in KEYS}
            for key in (*KEYS, "accuracy"):
                if make.random() < missing:
                    row[key] = [None, math.nan, math.inf][int(make.integers(0, 3))]
            rows.append(row)
        made.append(rows)
    return made


@pytest.mark.parametrize("missing", [0.0, 0.2])
def test_dominance_is_a_strict_order(missing: float) -> None:
    for rows in tables(missing, 60):
        for a in rows:
            assert not dominates(a, a, FEW)
            for b in rows:
                assert not (dominates(a, b, FEW) and dominates(b, a, FEW))
                for c in rows:
                    if dominates(a, b, FEW) and dominates(b, c, FEW):
                        assert dominates(a, c, FEW)


@pytest.mark.parametrize("missing", [0.0, 0.2])
def test_the_front_is_what_nothing_dominates(missing: float) -> None:
    for rows in tables(missing):
        found = front(rows, FEW)
        complete = [r for r in rows if known(r, ACCURACY) is not None]
        expected = [r for r in complete if not any(dominates(o, r, FEW) for o in complete)]
        assert [id(r) for r in found.on] == [id(r) for r in expected]
        assert sorted(map(id, found.on + found.off)) == sorted(map(id, rows))
        assert len(found.why) == len(found.off) and (found.on or not complete)
        # Whoever is off without lacking anything is dominated by somebody who is on.
        for row in found.off:
            assert row not in complete or any(dominates(o, row, FEW) for o in found.on)


def test_the_front_does_not_depend_on_order_or_units() -> None:
    for rows in tables(0.1, 60):
        names = {r["method"] for r in front(rows, FEW).on}
        assert {r["method"] for r in front(rows[::-1], FEW).on} == names
        scaled = [{**r, "seconds": None if r["seconds"] is None else 60 * r["seconds"]} for r in rows]
        assert {r["method"] for r in front(scaled, FEW).on} == names


def test_ties_are_kept() -> None:
    rows = [{"method": m, "accuracy": 0.8, "seconds": 3} for m in "ab"]
    assert front(rows, ALL).on == rows


def test_missing_values_are_said() -> None:
    rows = [
        {"method": "full", "accuracy": 0.9, "seconds": 10.0, "size_mb": 80.0},
        {"method": "lora", "accuracy": 0.9, "seconds": 10.0},
        {"method": "crashed", "accuracy": math.nan, "seconds": 0.1, "size_mb": 0.0},
    ]
    found = front(rows, [ACCURACY, *(k for k in COSTS if k.key in ("seconds", "size_mb", "forgetting"))])
    assert [r["method"] for r in found.on] == ["full"]
    assert found.why == [
        "full is as good and has a known size on disk (83.9 MB).",
        "crashed has no measured accuracy.",
    ]
    assert found.notes == [
        "No row has a measured forgetting, so it is no objective.",
        "accuracy is not known of crashed: without it a row cannot be on the front.",
        "size on disk is not known of lora: without it a row cannot be on the front for it.",
    ]
    assert [k.key for k in found.objectives] == ["accuracy", "seconds", "size_mb"]


def test_why_a_row_is_off() -> None:
    rows = [
        {"method": "full", "accuracy": 0.84, "peak_memory_mb": 1000.0, "seconds": 60.0},
        {"method": "lora", "accuracy": 0.85, "peak_memory_mb": 400.0, "seconds": 57.5},
    ]
    assert front(rows, ALL).why == [
        "lora is better (0.850 against 0.840) and needs 0.4 of the memory and trains in 0.96 of the time."
    ]


def test_as_good_within_the_interval() -> None:
    full = {
        "method": "full",
        "accuracy": 0.85,
        "accuracy_low": 0.83,
        "accuracy_high": 0.87,
        "peak_memory_mb": 1000,
    }
    lora = {"method": "lora(rank=2)", "accuracy": 0.84, "peak_memory_mb": 400}
    probe = {"method": "probe", "accuracy": 0.80, "peak_memory_mb": 100}
    said = ["lora(rank=2) is as good within the interval and needs 0.4 of the memory."]
    assert dominated_by(full, [full, lora, probe], ALL) == said
    assert front([full, lora, probe], ALL).off == []
    assert dominated_by(full, [full, lora, probe], ALL, same=lambda a, b: False) == []
    assert len(dominated_by(full, [full, lora, probe], ALL, same=lambda a, b: True)) == 2
    assert dominated_by(lora, [full, lora, probe], ALL) == []


def test_nobody_is_cheaper_and_dearer_at_once() -> None:
    """Equal within the noise and cheaper is no circle, whatever the paired test says."""
    for rows in tables(0.0):
        said = {
            r["method"]: {s.split()[0] for s in dominated_by(r, rows, FEW, lambda a, b: True)} for r in rows
        }
        for a, winners in said.items():
            assert not any(a in said[b] for b in winners)


def test_lower_can_be_better() -> None:
    loss = quality("loss", higher_is_better=False)
    a = {"method": "a", "loss": 1.0, "loss_low": 0.9, "loss_high": 1.1, "forgetting": 0.2}
    b = {"method": "b", "loss": 1.05, "forgetting": -0.1}
    assert dominates(a, b, [loss]) and as_good(b, a, loss) and not as_good({"loss": 1.2}, a, loss)
    assert dominated_by(a, [a, b], [loss, *COSTS]) == [
        "b is as good within the interval and forgets less (-0.100 against 0.200)."
    ]


def test_nothing_at_all_is_said_so() -> None:
    a = {"method": "majority", "accuracy": 0.5, "trainable": 0}
    b = {"method": "tfidf", "accuracy": 0.5, "trainable": 900}
    assert front([b, a], ALL).why == ["majority is as good and trains no parameters."]


@pytest.mark.parametrize("value", ["fast", True, [1.0]])
def test_what_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(UserError, match="seconds of lora must be a number"):
        front([{"method": "lora", "accuracy": 0.5, "seconds": value}], ALL)


def test_no_objectives_and_no_rows() -> None:
    with pytest.raises(UserError, match="at least one objective"):
        front([], [])
    assert front([], ALL).on == []
