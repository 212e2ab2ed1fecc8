"""Baselines without the pretrained model: the commonest class, the mean, TF-IDF with linear regression."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tunewise.core.errors import UserError

__all__ = ["FITTED", "sample"]

Row = dict[str, Any]
Predict = Callable[[Sequence[Row]], list[Any]]
# The function that answers rows, the numbers that were learnt, and how many bytes they and their words take.
Fit = Callable[[Any, Sequence[Row]], tuple[Predict, int, int]]


def _majority(task: Any, train: Sequence[Row]) -> tuple[Predict, int, int]:
    """Always the most frequent class of the training rows; of equally frequent ones the first by name."""
    counts = Counter(task.labels[task.label_of(row)] for row in train)
    best = min(counts, key=lambda name: (-counts[name], name))
    return lambda rows: [best] * len(rows), 0, 0


def _mean(task: Any, train: Sequence[Row]) -> tuple[Predict, int, int]:
    """Always the mean of the training rows."""
    value = float(np.mean([task.label_of(row) for row in train])) * task.std + task.mean
    return lambda rows: [value] * len(rows), 0, 0


def _tfidf(task: Any, train: Sequence[Row]) -> tuple[Predict, int, int]:
    """y = W tfidf(x) + b over words and pairs of words, by logistic or (regression) ridge regression.

    For texts without spaces (protein sequences) it counts one to three letters instead of words.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline

    texts = _texts(task, train)
    spaced = sum(" " in text.strip() for text in texts) > len(texts) / 2
    analyzer, longest = ("word", 2) if spaced else ("char", 3)
    features = TfidfVectorizer(analyzer=analyzer, ngram_range=(1, longest), sublinear_tf=True)
    numbers = task.name == "regression"
    last = Ridge(alpha=1.0) if numbers else LogisticRegression(C=10.0, max_iter=1000)
    model, answers = make_pipeline(features, last), [task.label_of(row) for row in train]
    try:
        model.fit(texts, answers)
    except ValueError as error:
        raise UserError(f"TF-IDF with linear regression cannot be fitted: {error}.") from None
    weights = np.size(last.coef_) + np.size(last.intercept_)
    size = 8 * (weights + len(features.idf_)) + sum(len(word.encode()) for word in features.vocabulary_)

    def predict(rows: Sequence[Row]) -> list[Any]:
        found = model.predict(_texts(task, rows)).tolist()
        return [n * task.std + task.mean for n in found] if numbers else [task.labels[i] for i in found]

    return predict, weights, size


def _texts(task: Any, rows: Sequence[Row]) -> list[str]:
    return ["\n".join(task.text_of(row, column) for column in task.columns.text) for row in rows]


def sample(task: Any, rows: Sequence[Row], count: int) -> list[Row]:
    """At most `count` rows, evenly through all of them ordered by answer: every frequent one is there."""
    ordered = sorted(rows, key=lambda row: task.label_of(row))
    places = np.linspace(0, len(rows) - 1, min(count, len(rows)))
    return [ordered[int(place)] for place in places]


FITTED: dict[str, tuple[tuple[str, ...], Fit]] = {
    "majority": (("classification", "image_classification"), _majority),
    "mean": (("regression",), _mean),
    "tfidf": (("classification", "regression"), _tfidf),
}
"""By name: the tasks that the baseline is for, and (task, training rows) -> how it answers."""
