"""Plain baselines that need no pretrained model: what fine-tuning has to beat."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tunewise.core.errors import UserError

if TYPE_CHECKING:
    from tunewise.data import Columns

__all__ = ["majority", "tfidf"]

Row = dict[str, Any]


def majority(train: Sequence[Row], test: Sequence[Row], columns: Columns) -> dict[str, float]:
    """Always the most frequent class of the training rows; of equally frequent ones the first by name."""
    start = time.perf_counter()
    counts = Counter(_labels(train, columns))
    best = min(counts, key=lambda name: (-counts[name], name))
    predicted, seconds = [best] * len(test), time.perf_counter() - start
    return {**_measured(predicted, _labels(test, columns)), "trainable": 0, "seconds": seconds}


def tfidf(train: Sequence[Row], test: Sequence[Row], columns: Columns) -> dict[str, float]:
    """P(y | x) = softmax(W tfidf(x) + b) over words and pairs of words, W and b by logistic regression.

    For texts without spaces (protein sequences) it counts one to three letters instead of words.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    start = time.perf_counter()
    texts = _texts(train, columns)
    spaced = sum(" " in text.strip() for text in texts) > len(texts) / 2
    analyzer, longest = ("word", 2) if spaced else ("char", 3)
    features = TfidfVectorizer(analyzer=analyzer, ngram_range=(1, longest), sublinear_tf=True)
    model = make_pipeline(features, LogisticRegression(C=10.0, max_iter=1000))
    try:
        model.fit(texts, _labels(train, columns))
    except ValueError as error:
        raise UserError(f"TF-IDF with logistic regression cannot be fitted: {error}.") from None
    predicted, seconds = list(model.predict(_texts(test, columns))), time.perf_counter() - start
    trainable = int(model[-1].coef_.size + model[-1].intercept_.size)
    return {**_measured(predicted, _labels(test, columns)), "trainable": trainable, "seconds": seconds}


def _labels(rows: Sequence[Row], columns: Columns) -> list[str]:
    if columns.label is None or not rows:
        raise UserError("A baseline needs rows with a label column.")
    return [str(row[columns.label]) for row in rows]


def _texts(rows: Sequence[Row], columns: Columns) -> list[str]:
    return ["\n".join(str(row.get(name) or "") for name in columns.text) for row in rows]


def _measured(predicted: Sequence[str], true: Sequence[str]) -> dict[str, float]:
    """The scores that a classification task gives, by the same functions."""
    from tunewise.task.metrics import confusion, confusion_scores, wilson

    place = {name: i for i, name in enumerate(sorted({*predicted, *true}))}
    counts = confusion([place[t] for t in true], [place[p] for p in predicted], len(place))
    low, high = wilson(float(counts.trace()), len(true))
    return {**confusion_scores(counts), "accuracy_low": low, "accuracy_high": high}
