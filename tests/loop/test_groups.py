"""Frozen states are computed in batches that nobody who asks for them decides."""

from __future__ import annotations

import ast
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.loop.test_features import MANY, examples, model, run_of
from tunewise.core.run import Run
from tunewise.core.streams import Stream
from tunewise.loop.features import frozen_features


def computed_batches(run: Run, asked: list[list[dict[str, Any]]], store: dict[Any, Any]) -> list[str]:
    """The batches that go through the frozen blocks when rows are asked for in these batches."""
    found: list[str] = []
    before = len(store)
    run.model.eval()
    with frozen_features(run, store, limit_bytes=MANY, order=0) as features, torch.no_grad():
        plain = features._compute

        def noted(inputs: dict[str, Tensor]) -> dict[int, Tensor]:
            found.append(str(inputs["input_ids"].tolist()))
            return plain(inputs)

        features._compute = noted  # type: ignore[method-assign]
        for rows in asked:
            run.forward(run.collate(rows))
        assert features.computed == len(store) - before and features.served == sum(map(len, asked))
    return sorted(found)


def test_no_trial_decides_in_which_batches_states_are_computed() -> None:
    train, valid = examples(18, 0), examples(7, 1)
    one: dict[Any, Any] = {}
    two: dict[Any, Any] = {}
    run = run_of(model("bert"), "head_only")
    stream = Stream("train", train, 4, seed=0)
    few = computed_batches(run, [[train[stream.order(0)[2][0]]], [valid[3]]], one)
    rest = computed_batches(run, [[*valid, *train[::-1]]], one)
    apart = computed_batches(run, [train[:7], train[7:], valid[::2], valid[1::2]], two)
    assert len(few) == 2 and sorted(few + rest) == apart
    assert len(apart) == len(stream) + 2
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    other = examples(3, 8)
    with frozen_features(run, one, limit_bytes=MANY, order=0) as features, torch.no_grad():
        run.forward(run.collate(other))
    assert features.computed == 3 and len(one) == len(two) + 3


def test_long_rows_are_computed_in_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunewise.loop.groups.POSITIONS", 24)
    run, store = run_of(model("bert"), "head_only"), {}
    found = computed_batches(run, [examples(18, 0)], store)
    shapes = [torch.tensor(ast.literal_eval(text)).shape for text in found]
    assert sum(rows for rows, _ in shapes) == 18
    assert all(rows == 1 or rows * width <= 24 for rows, width in shapes) and len(shapes) > 5
