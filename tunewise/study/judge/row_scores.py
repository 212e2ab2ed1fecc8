"""From the `test.parquet` of measured trials to scores that `statistics.py` resamples, rows paired by their ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tunewise.core.errors import UserError
from tunewise.study.judge.resample import Measured, RowMetric
from tunewise.study.store import Store
from tunewise.study.tables import Trial

__all__ = ["METRICS", "TestRows", "row_scores"]

METRICS: Mapping[str, tuple[str, ...]] = {
    "classification": ("accuracy", "macro_f1", "balanced_accuracy", "matthews"),
    "image_classification": ("accuracy", "macro_f1", "balanced_accuracy", "matthews"),
    "regression": ("rmse", "mae", "pearson", "spearman"),
    "causal": ("loss", "perplexity", "token_accuracy", "exact_match"),
}
"""Metrics that the kept rows determine, by task; a user's own function is not among them."""

Columns = Mapping[str, np.ndarray]
FILE = "test.parquet"
MAX_EXPONENT = 700.0


class TestRows:
    """Reads test rows of one study; all trials must have the same ids in the same order as the first one read."""

    __test__ = False

    def __init__(self, store: Store, facts: Mapping[str, Any]) -> None:
        """facts: of the study; task, metric, and whether it is a function (`custom_metric`)"""
        self.store, self.task, self.metric = store, str(facts["task"]), str(facts["metric"])
        self.known = self.metric in METRICS.get(self.task, ()) and not facts.get("custom_metric")
        self._ids: np.ndarray | None = None
        self._first = ""

    def scores(self, trials: Sequence[Trial]) -> Measured | None:
        """Seeds of one method -> scores `[seeds, rows]` or a `RowMetric`; None where a trial kept no rows.

        None too for a metric that the rows do not determine. Raises `UserError` that names the trial for a
        file that cannot be read, lacks a column, or holds other rows.
        """
        if not self.known:
            return None
        files = [self.store.path(trial) / FILE for trial in trials]
        if not all(file.is_file() for file in files):
            return None
        return row_scores(self.task, self.metric, [self._read(trial) for trial in trials])

    def _read(self, trial: Trial) -> Columns:
        import pandas as pd

        name, file = _called(trial), self.store.path(trial) / FILE
        try:
            table = pd.read_parquet(file)
        except (OSError, ValueError) as error:
            raise UserError(f"The test rows of {name} cannot be read from {file}: {error}.") from None
        wanted = ("id", *_columns(self.task, self.metric))
        for column in wanted:
            if column not in table:
                raise UserError(f'{file} of {name} has no column "{column}", which {self.metric} needs.')
        self._same_rows(name, table["id"].astype(str).to_numpy(dtype=object))
        return {column: table[column].to_numpy() for column in wanted}

    def _same_rows(self, name: str, ids: np.ndarray) -> None:
        if self._ids is None:
            self._ids, self._first = ids, name
            return
        where = f"The test rows of {name} are not those of {self._first}"
        if len(ids) != len(self._ids):
            raise UserError(f"{where}: {len(ids):,} rows, not {len(self._ids):,}.")
        other = np.flatnonzero(ids != self._ids)
        if len(other):
            i = int(other[0])
            raise UserError(f'{where}: row {i + 1} is "{ids[i]}", not "{self._ids[i]}".')


def row_scores(task: str, metric: str, seeds: Sequence[Columns]) -> Measured:
    """Scores `[seeds, rows]` where the metric is their mean, else a `RowMetric`; `seeds` hold columns `[rows]`.

    Equal to the metrics of the tasks on all rows. Means per token (loss, perplexity, token_accuracy) weigh rows
    by their tokens.
    """
    if metric == "exact_match":
        return np.stack([np.asarray(s["right"], dtype=float) for s in seeds])
    if task == "causal":
        return _per_token(metric, seeds)
    if task == "regression":
        truth = np.asarray(seeds[0]["reference"], dtype=float)
        return _regression(metric, truth, np.stack([np.asarray(s["prediction"], float) for s in seeds]))
    truth, said = _codes(seeds)
    return (said == truth).astype(float) if metric == "accuracy" else _confusion(metric, truth, said)


def _called(trial: Trial) -> str:
    return f"trial {trial.id} ({trial.method}, seed {trial.seed})"


def _columns(task: str, metric: str) -> tuple[str, ...]:
    if metric == "exact_match":
        return ("right",)
    if task == "causal":
        return ("token_accuracy" if metric == "token_accuracy" else "loss", "tokens")
    return ("reference", "prediction")


def _weights(rows: np.ndarray, n: int) -> np.ndarray:
    """How often each of the n rows is among the drawn ones: cheaper to weigh by than to gather."""
    return np.bincount(rows, minlength=n).astype(float)


def _per_token(metric: str, seeds: Sequence[Columns]) -> RowMetric:
    tokens = np.stack([np.asarray(s["tokens"], dtype=float) for s in seeds])
    column = "token_accuracy" if metric == "token_accuracy" else "loss"
    sums = np.stack([np.asarray(s[column], dtype=float) for s in seeds]) * tokens
    n = tokens.shape[1]

    def score(rows: np.ndarray) -> np.ndarray:
        weights = _weights(rows, n)
        mean = (sums @ weights) / (tokens @ weights)
        return np.exp(np.minimum(mean, MAX_EXPONENT)) if metric == "perplexity" else mean

    return RowMetric(score, n)


def _codes(seeds: Sequence[Columns]) -> tuple[np.ndarray, np.ndarray]:
    """(truth [rows], predictions [seeds, rows]) as numbers of classes."""
    import pandas as pd

    columns = [seeds[0]["reference"], *(s["prediction"] for s in seeds)]
    flat = np.concatenate([np.asarray(column).astype(str).astype(object) for column in columns])
    codes = pd.factorize(flat)[0].reshape(len(columns), -1)
    return codes[0], codes[1:]


def _confusion(metric: str, truth: np.ndarray, said: np.ndarray) -> RowMetric:
    """Rows with the same truth and predictions count together, so that a resample is a few hundred numbers."""
    classes, seeds = int(max(truth.max(), said.max())) + 1, len(said)
    kinds, place = np.unique(np.vstack([truth, said]), axis=1, return_inverse=True)
    place, number = place.reshape(-1), kinds.shape[1]
    hit = (kinds[1:] == kinds[0]).reshape(-1)
    cells = (kinds[1:] + classes * np.arange(seeds)[:, None]).reshape(-1)
    hit_cells = cells[hit]

    def score(rows: np.ndarray) -> np.ndarray:
        counts = _weights(place[rows], number)
        each = np.tile(counts, seeds)
        answers = np.bincount(cells, each, seeds * classes).reshape(seeds, classes)
        hits = np.bincount(hit_cells, each[hit], seeds * classes).reshape(seeds, classes)
        return _of_counts(metric, hits, np.bincount(kinds[0], counts, classes), answers)

    return RowMetric(score, len(place))


def _of_counts(metric: str, hits: np.ndarray, truth: np.ndarray, said: np.ndarray) -> np.ndarray:
    """hits, said [seeds, classes], truth [classes] -> [seeds]; as `confusion_scores`, all seeds at once."""
    if metric == "balanced_accuracy":
        there = truth > 0
        balanced: np.ndarray = (hits[:, there] / truth[there]).mean(axis=1)
        return balanced
    if metric == "macro_f1":
        both = truth + said
        f1: np.ndarray = (2 * hits / np.maximum(both, 1)).sum(axis=1) / (both > 0).sum(axis=1)
        return f1
    n = truth.sum()
    spread = (n**2 - (said**2).sum(axis=1)) * (n**2 - truth @ truth)
    above = hits.sum(axis=1) * n - said @ truth
    return np.where(spread > 0, above / np.sqrt(np.where(spread > 0, spread, 1.0)), 0.0)


def _regression(metric: str, truth: np.ndarray, said: np.ndarray) -> Measured:
    """truth [rows], said [seeds, rows], in the units of the data."""
    if metric == "mae":
        return np.abs(said - truth)
    n = len(truth)
    if metric == "rmse":
        squares = (said - truth) ** 2
        return RowMetric(lambda rows: np.sqrt(squares @ _weights(rows, n) / len(rows)), n)
    if metric == "pearson":
        x, y = np.stack([_centred(one) for one in said]), _centred(truth)
        sums = np.stack([x, x * x, x * y]).reshape(-1, n)
        own = np.stack([y, y * y])

        def pearson(rows: np.ndarray) -> np.ndarray:
            weights = _weights(rows, n) / len(rows)
            mx, xx, xy = (sums @ weights).reshape(3, -1)
            my, yy = own @ weights
            return _correlation(_spread(xx, mx), _spread(yy, my), xy - mx * my)

        return RowMetric(pearson, n)
    y_ranks, x_ranks = _Ranks(truth), [_Ranks(one) for one in said]

    def spearman(rows: np.ndarray) -> np.ndarray:
        weights = _weights(rows, n)
        counts, y = y_ranks.of(weights)
        vy, y_rows = float(counts @ (y * y)), weights * y[y_ranks.place]
        found = []
        # One seed after the other: arrays that fit into the cache are faster than fewer, larger ones.
        for one in x_ranks:
            counts, x = one.of(weights)
            found.append((float(counts @ (x * x)), float(one.by_value(y_rows) @ x)))
        vx, covariance = np.array(found).T
        return _correlation(vx, vy, covariance)

    return RowMetric(spearman, n)


def _centred(values: np.ndarray) -> np.ndarray:
    """Around 0, so that sums of squares lose no digits; exactly 0 where all are equal."""
    return np.zeros_like(values) if np.ptp(values) == 0 else values - values.mean()


def _spread(squares: Any, mean: Any) -> Any:
    """Mean square less squared mean; exactly 0 where rounding is all there is of it."""
    spread = squares - mean * mean
    return np.where(spread > 1e-12 * squares, spread, 0.0)


def _correlation(vx: np.ndarray, vy: float, covariance: np.ndarray) -> np.ndarray:
    """cov / sqrt(v_x v_y) [seeds]; 0 where one side is constant."""
    scale = vx * vy
    varies = (vx > 0) & (vy > 0)
    return np.where(varies, covariance / np.sqrt(np.where(varies, scale, 1.0)), 0.0)


class _Ranks:
    """Ranks of different values, ascending, among drawn rows; `place` is the value of each row."""

    def __init__(self, values: np.ndarray) -> None:
        different, place = np.unique(values, return_inverse=True)
        self.place = place.reshape(-1)
        self.order = np.argsort(self.place, kind="stable")
        self.ends = np.searchsorted(self.place[self.order], np.arange(len(different)), side="right") - 1

    def by_value(self, numbers: np.ndarray) -> np.ndarray:
        """[rows] -> [values], sums over the rows of each value."""
        ordered = numbers[self.order]
        if len(self.ends) == len(ordered):
            return ordered
        sums: np.ndarray = np.diff(np.cumsum(ordered)[self.ends], prepend=0.0)
        return sums

    def of(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How often each row is drawn -> (counts, ranks less their mean) [values]; equal values share a rank."""
        counts = self.by_value(weights)
        return counts, np.cumsum(counts) - counts / 2 - weights.sum() / 2
