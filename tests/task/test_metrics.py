from __future__ import annotations

import numpy as np
import pytest

from tunewise.task.metrics import (
    bootstrap,
    bootstrap_confusion,
    confusion,
    confusion_scores,
    exact_match,
    final_answer,
    regression_scores,
    wilson,
)


@pytest.mark.parametrize("classes", [2, 5])
def test_classification_agrees_with_scikit_learn(classes: int) -> None:
    from sklearn import metrics as sk

    draw = np.random.default_rng(classes)
    said, right = draw.integers(classes, size=60), draw.integers(classes, size=60)
    found = confusion_scores(confusion(right.tolist(), said.tolist(), classes + 1))
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(right, said))
    assert found["macro_f1"] == pytest.approx(sk.f1_score(right, said, average="macro"))
    assert found["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(right, said))
    assert found["matthews"] == pytest.approx(sk.matthews_corrcoef(right, said))


def test_regression_agrees_with_scipy() -> None:
    from scipy import stats

    draw = np.random.default_rng(0)
    said, right = draw.normal(size=50).round(1), draw.normal(size=50).round(1)
    found = regression_scores(right, said)
    assert found["pearson"] == pytest.approx(stats.pearsonr(said, right)[0])
    assert found["spearman"] == pytest.approx(stats.spearmanr(said, right)[0])
    assert regression_scores(np.arange(3.0), np.full(3, 0.1))["pearson"] == 0.0


def test_wilson_interval_of_the_textbook() -> None:
    low, high = wilson(5, 10)
    assert (low, high) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    assert wilson(10, 10)[1] == pytest.approx(1.0) and wilson(0, 10)[0] == 0.0


def test_bootstrap_is_repeatable_and_holds_the_estimate() -> None:
    values = np.random.default_rng(0).normal(size=200)
    low, high = bootstrap(200, lambda rows: float(values[rows].mean()))
    assert low < values.mean() < high
    assert (low, high) == bootstrap(200, lambda rows: float(values[rows].mean()))
    table = np.array([[40, 10], [5, 45]])
    low, high = bootstrap_confusion(table, "macro_f1")
    assert low < confusion_scores(table)["macro_f1"] < high


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2 + 2\n#### 4", "4"),
        ("#### 1,234.", "1234"),
        ("#### $5", "5"),
        ("#### 1 #### 2\nmore", "2"),
        ("  plain   text ", "plain text"),
        ("####", ""),
    ],
)
def test_final_answers(text: str, answer: str) -> None:
    assert final_answer(text) == answer


def test_exact_match_compares_final_answers() -> None:
    assert exact_match(["so #### 4", "#### 5"], ["2 and 2 #### 4", "#### 6"]) == 0.5
