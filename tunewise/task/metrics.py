"""Metrics as plain functions (predictions, references) -> float, and their 95 % intervals."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tunewise.core.errors import UserError

__all__ = [
    "CLASSIFICATION",
    "REGRESSION",
    "accuracy",
    "balanced_accuracy",
    "exact_match",
    "final_answer",
    "interval",
    "macro_f1",
    "mae",
    "matthews",
    "pearson",
    "r2",
    "rmse",
    "spearman",
    "wilson",
]

Metric = Callable[[Any, Any], float]
RESAMPLES, RESAMPLES_SLOW = 1000, 200
Z95 = 1.959963984540054


def accuracy(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """Share of predictions that equal the reference."""
    return float(np.mean(np.asarray(predictions) == np.asarray(references)))


def _confusion(predictions: Any, references: Any) -> np.ndarray:
    """Counts `[reference, prediction]` over the classes that occur in either."""
    both = np.concatenate([np.asarray(references), np.asarray(predictions)])
    names, index = np.unique(both, return_inverse=True)
    half, classes = len(both) // 2, len(names)
    return np.bincount(index[:half] * classes + index[half:], minlength=classes**2).reshape(classes, classes)


def macro_f1(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """Mean over classes of 2 TP / (2 TP + FP + FN)."""
    table = _confusion(predictions, references)
    return float(np.mean(2 * np.diag(table) / (table.sum(0) + table.sum(1))))


def balanced_accuracy(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """Mean recall over the classes that occur among the references."""
    table = _confusion(predictions, references)
    present = table.sum(1) > 0
    return float(np.mean(np.diag(table)[present] / table.sum(1)[present]))


def matthews(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """Matthews correlation of predicted and right classes; 0 where either never varies."""
    table = _confusion(predictions, references).astype(float)
    right, said, total = table.sum(1), table.sum(0), table.sum()
    spread = (total**2 - said @ said) * (total**2 - right @ right)
    return float((np.trace(table) * total - right @ said) / math.sqrt(spread)) if spread > 0 else 0.0


def _numbers(predictions: Any, references: Any) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(predictions, dtype=float), np.asarray(references, dtype=float)


def rmse(predictions: Sequence[float], references: Sequence[float]) -> float:
    """sqrt(mean (p - r)^2)."""
    p, r = _numbers(predictions, references)
    return float(np.sqrt(np.mean((p - r) ** 2)))


def mae(predictions: Sequence[float], references: Sequence[float]) -> float:
    """mean |p - r|."""
    p, r = _numbers(predictions, references)
    return float(np.mean(np.abs(p - r)))


def r2(predictions: Sequence[float], references: Sequence[float]) -> float:
    """1 - sum (p - r)^2 / sum (r - mean r)^2; 0 where the references never vary."""
    p, r = _numbers(predictions, references)
    spread = float(np.sum((r - r.mean()) ** 2))
    return 1.0 - float(np.sum((p - r) ** 2)) / spread if spread > 0 else 0.0


def pearson(predictions: Sequence[float], references: Sequence[float]) -> float:
    """Linear correlation; 0 where either side never varies."""
    p, r = _numbers(predictions, references)
    if np.ptp(p) == 0 or np.ptp(r) == 0:
        return 0.0
    p, r = p - p.mean(), r - r.mean()
    scale = np.linalg.norm(p) * np.linalg.norm(r)
    return float(p @ r / scale) if scale > 0 else 0.0


def spearman(predictions: Sequence[float], references: Sequence[float]) -> float:
    """Correlation of the ranks, ties sharing their mean rank; 0 where either side never varies."""
    p, r = _numbers(predictions, references)
    return pearson(_ranks(p), _ranks(r))  # type: ignore[arg-type]


def _ranks(values: np.ndarray) -> np.ndarray:
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    last: np.ndarray = np.cumsum(counts) - (counts - 1) / 2
    return last[index]


def final_answer(text: str) -> str:
    """What stands after the last "####", without thousands separators; or else the whole text."""
    _, mark, end = text.rpartition("####")
    if not mark:
        return " ".join(text.split())
    line = end.strip().splitlines()[0] if end.strip() else ""
    number = re.search(r"-?\d[\d,]*(?:\.\d+)?", line)
    if number is None:
        return line.strip()
    digits = number.group().replace(",", "")
    return re.sub(r"\.0+$", "", digits)


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of generated texts with the right final answer; a text without "####" is compared as a whole."""
    hits = [final_answer(p) == final_answer(r) for p, r in zip(predictions, references, strict=True)]
    return sum(hits) / len(hits)


CLASSIFICATION: dict[str, Metric] = {
    "accuracy": accuracy,
    "macro_f1": macro_f1,
    "balanced_accuracy": balanced_accuracy,
    "matthews": matthews,
}
REGRESSION: dict[str, Metric] = {"rmse": rmse, "mae": mae, "pearson": pearson, "spearman": spearman, "r2": r2}


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a share among `count`. Source: Wilson, 1927."""
    z2 = Z95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def interval(
    metric: Metric, predictions: Sequence[Any], references: Sequence[Any], fast: bool = True
) -> tuple[float, float]:
    """95 % interval: Wilson for shares of right answers, else percentiles of 1,000 resampled row sets.

    The resampling has a fixed seed. `fast=False` makes it 200 and hands the metric plain lists.
    """
    if len(predictions) != len(references) or not len(references):
        raise UserError(
            f"{len(predictions)} predictions for {len(references)} references cannot be measured."
        )
    if metric in (accuracy, exact_match):
        return wilson(metric(predictions, references), len(references))
    generator = np.random.default_rng(0)
    count, values = len(references), []
    left, right = (np.asarray(predictions), np.asarray(references)) if fast else (None, None)
    for _ in range(RESAMPLES if fast else RESAMPLES_SLOW):
        chosen = generator.integers(count, size=count)
        if left is not None and right is not None:
            values.append(metric(left[chosen], right[chosen]))
        else:
            values.append(float(metric([predictions[i] for i in chosen], [references[i] for i in chosen])))
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
