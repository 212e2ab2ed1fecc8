"""Test rows as scores: those of the tasks, of the same rows, and none for functions of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.study.made_study import COSTS, ROWS, MadeStudy, rows_of
from tunewise.core.errors import UserError
from tunewise.study.judge.row_scores import METRICS, row_scores
from tunewise.task import CausalLM, Classification, ImageClassification, Regression
from tunewise.task.metrics import confusion, confusion_scores, regression_scores


@pytest.fixture
def study(tmp_path: Path) -> Any:
    made = MadeStudy(tmp_path / "study")
    yield made
    made.store.close()


def test_scores_of_rows_are_those_of_the_tasks() -> None:
    make, n = np.random.default_rng(0), 200
    drawn = [np.arange(n), make.integers(0, n, n), np.full(n, 7)]
    truth = make.integers(0, 4, n)
    said = [np.where(make.random(n) < 0.7, truth, make.integers(0, 5, n)), np.full(n, 2)]
    number = np.round(truth + make.normal(size=n), 1)
    guesses = [np.round(number + make.normal(size=n), 1), np.full(n, 0.3)]
    for metric in METRICS["classification"]:
        found = row_scores("classification", metric, [{"reference": truth, "prediction": p} for p in said])
        for rows in drawn:
            expected = [confusion_scores(confusion(truth[rows], p[rows], 5))[metric] for p in said]
            assert values(found, rows) == pytest.approx(expected)
    for metric in METRICS["regression"]:
        found = row_scores("regression", metric, [{"reference": number, "prediction": p} for p in guesses])
        for rows in drawn:
            expected = [regression_scores(number[rows], p[rows])[metric] for p in guesses]
            assert values(found, rows) == pytest.approx(expected, abs=1e-12)
    columns = {"loss": make.random(n), "token_accuracy": make.random(n), "tokens": make.integers(1, 9, n)}
    for metric in ("loss", "token_accuracy", "perplexity"):
        column, found = columns.get(metric, columns["loss"]), row_scores("causal", metric, [columns])
        for rows in drawn:
            mean = np.average(column[rows], weights=columns["tokens"][rows])
            assert values(found, rows) == pytest.approx([np.exp(mean) if metric == "perplexity" else mean])


def values(scores: Any, rows: np.ndarray) -> list[float]:
    found = scores[:, rows].mean(axis=1) if isinstance(scores, np.ndarray) else scores.score(rows)
    return [float(v) for v in found]


def test_the_known_metrics_are_those_of_the_tasks() -> None:
    tasks = (Classification, ImageClassification, Regression, CausalLM)
    assert {t.name: tuple(t.scores) for t in tasks} == METRICS


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda t: t[::-1],
            r'trial 2 \(full, seed 0\) are not those of trial 1 .*row 1 is "row-399", not "row-0"',
        ),
        (lambda t: t[:-1], "399 rows, not 400"),
        (lambda t: t.drop(columns="prediction"), 'trial 2 .*has no column "prediction"'),
        (None, "The test rows of trial 2 .*cannot be read"),
    ],
)
def test_test_rows_that_are_not_the_same(study: MadeStudy, change: Any, sentence: str) -> None:
    study.classified("lora", range(20))
    trial = study.store.trial(study.classified("full", range(30)))
    file = study.store.path(trial) / "test.parquet"
    if change is None:
        file.write_bytes(b"PAR1 cut")
    else:
        change(pd.read_parquet(file)).to_parquet(file, index=False)
    with pytest.raises(UserError, match=sentence):
        study.find()


def test_a_metric_of_ones_own_has_no_paired_tests(tmp_path: Path) -> None:
    study = MadeStudy(tmp_path / "study", metric="cost", custom_metric=True)
    study.classified("lora", range(20), cost=0.8, cost_low=0.7, cost_high=0.9)
    study.baseline("tfidf", range(40), cost=0.75, cost_low=0.65, cost_high=0.85)
    with study.store:
        found = study.find()
    rows = rows_of(found)
    assert (rows["lora"]["cost_low"], rows["lora"]["cost"], rows["lora"]["cost_high"]) == (0.7, 0.8, 0.9)
    assert rows["tfidf"]["vs_best"] is None and rows["lora"]["command"] is None
    assert found["decision"] == [
        "Take lora at learning rate 0.001. lora has the highest cost: 0.800.",
        "tfidf (0.750) lies within the interval of lora: fine-tuning may not be worth it with this data.",
    ]
    assert any("no paired tests were made" in note for note in found["notes"])


def test_a_function_named_like_a_metric_is_not_tested_by_it(study: MadeStudy) -> None:
    study.classified("lora", range(20))
    study.classified("full", range(20), accuracy=0.123)
    study.measured("partial", 1e-3, 0, {"accuracy": 0.7, **COSTS}, None)
    found = study.find()
    assert rows_of(found)["full"]["accuracy"] == 0.123 and rows_of(found)["full"]["vs_best"] is None
    assert any(note.endswith("do not give the measured accuracy: partial, full.") for note in found["notes"])


def test_language_models_are_scored_by_tokens_or_by_answers(tmp_path: Path) -> None:
    study = MadeStudy(tmp_path / "study", task="causal", metric="exact_match")
    make = np.random.default_rng(0)
    for method, hits in (("lora", 250), ("few_shot", 100)):
        right = make.permutation(np.arange(ROWS) < hits)
        rows = study.frame(loss=make.random(ROWS), token_accuracy=0.5, tokens=3.0, answer="7", right=right)
        kind = "baseline" if method == "few_shot" else "tuned"
        study.measured(method, 1e-4, 0, {"exact_match": hits / ROWS, "kind": kind, **COSTS}, rows)
    study.tuned("lora", 1e-4, 1.5, **{"valid/accuracy": None, "valid/loss": 1.5})
    with study.store:
        found = study.find()
    assert found["choice"]["method"] == "lora"
    assert rows_of(found)["few_shot"]["vs_lora"]["verdict"] == "worse"
