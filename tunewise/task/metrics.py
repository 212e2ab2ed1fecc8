"""Scores of predictions, and 95 % intervals of the main one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

__all__ = [
    "bootstrap",
    "bootstrap_confusion",
    "confusion",
    "confusion_scores",
    "custom_score",
    "exact_match",
    "final_answer",
    "regression_scores",
    "wilson",
]

RESAMPLES = 1000
CUSTOM_RESAMPLES = 200
Z95 = 1.959963984540054


def confusion(truth: Sequence[int], predicted: Sequence[int], classes: int) -> np.ndarray:
    """Counts `[classes, classes]`: row = truth, column = prediction."""
    table = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(table, (np.asarray(truth, dtype=np.int64), np.asarray(predicted, dtype=np.int64)), 1)
    return table


def confusion_scores(table: np.ndarray) -> dict[str, float]:
    """accuracy, macro F1, balanced accuracy and Matthews correlation of a table of counts.

    Macro F1 is the mean over classes in truth or prediction, balanced accuracy over those in truth.
    """
    hits, truth, said, n = np.diag(table), table.sum(1), table.sum(0), int(table.sum())
    f1 = 2 * hits[truth + said > 0] / (truth + said)[truth + said > 0]
    recall = hits[truth > 0] / truth[truth > 0]
    total = float(n) ** 2
    spread = (total - float(np.square(said, dtype=float).sum())) * (
        total - float(np.square(truth, dtype=float).sum())
    )
    mcc = (
        (float(hits.sum()) * n - float(np.dot(said.astype(float), truth))) / math.sqrt(spread)
        if spread > 0
        else 0.0
    )
    return {
        "accuracy": float(hits.sum() / n),
        "macro_f1": float(f1.mean()),
        "balanced_accuracy": float(recall.mean()),
        "matthews": mcc,
    }


def regression_scores(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """rmse, mae, Pearson and Spearman correlation (0 where one side is constant)."""
    error = predicted - truth
    return {
        "rmse": float(np.sqrt(np.mean(error**2))),
        "mae": float(np.mean(np.abs(error))),
        "pearson": _correlation(truth, predicted),
        "spearman": _correlation(_ranks(truth), _ranks(predicted)),
    }


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale > 0 else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share their mean rank."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def wilson(hits: float, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion."""
    p, z2 = hits / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(
    n: int, score: Callable[[np.ndarray], float], resamples: int = RESAMPLES
) -> tuple[float, float]:
    """The 2.5 % and 97.5 % points of `score(rows)` over resampled row numbers; the same for the same data."""
    make = np.random.default_rng(0)
    return _ends([score(make.integers(0, n, n)) for _ in range(resamples)])


def bootstrap_confusion(table: np.ndarray, name: str) -> tuple[float, float]:
    """The bootstrap over rows, drawn directly as tables of counts."""
    make, n = np.random.default_rng(0), int(table.sum())
    draws = (make.multinomial(n, table.ravel() / n).reshape(table.shape) for _ in range(RESAMPLES))
    return _ends([confusion_scores(draw)[name] for draw in draws])


def _ends(values: list[float]) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def custom_score(
    metric: Callable[[list[Any], list[Any]], float], predictions: Sequence[Any], references: Sequence[Any]
) -> tuple[float, float, float]:
    """(score, low, high) of a user's own metric."""

    def score(rows: np.ndarray) -> float:
        return float(metric([predictions[i] for i in rows], [references[i] for i in rows]))

    return (score(np.arange(len(references))), *bootstrap(len(references), score, CUSTOM_RESAMPLES))


def final_answer(text: str) -> str:
    """What stands after the last `####`, without commas, spaces, $ and final dot; else the text's words."""
    if "####" not in text:
        return " ".join(text.split())
    lines = text.rsplit("####", 1)[1].strip().splitlines()
    answer = lines[0] if lines else ""
    return re.sub(r"[,$ ]", "", answer).rstrip(".")


def exact_match(texts: Sequence[str], references: Sequence[str]) -> float:
    """The share of texts whose final answer is that of the reference."""
    same = [final_answer(t) == final_answer(r) for t, r in zip(texts, references, strict=True)]
    return sum(same) / len(same)
