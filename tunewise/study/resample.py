"""Scores resampled over test rows and seeds, the same rows for every method, so that differences are paired.

Rows are drawn with replacement (Efron and Tibshirani 1993; paired: Koehn 2004). Seeds are few: drawing three of them
with replacement gives intervals that miss one time in five. So their effect comes from a t distribution instead, by
the random-effects estimate of its size (rows and seeds are crossed: Owen 2007, "The pigeonhole bootstrap").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tunewise.core.errors import UserError

__all__ = ["Draws", "Measured", "RowMetric", "mean_score", "resample", "row_count", "with_seeds"]

CHUNK = 2_000_000


@dataclass(frozen=True)
class RowMetric:
    """score(I) [seeds] for row numbers I `[any]`, repeats allowed: a metric that is no mean of per-row scores.

    rows  how many test rows there are. One macro-F1 per seed: `RowMetric(lambda rows: [f1(truth[rows], p[rows])
          for p in predicted], rows=len(truth))`. Resamples without a finite score are left out and counted.
    """

    score: Callable[[np.ndarray], Sequence[float] | np.ndarray]
    rows: int


Measured = np.ndarray | Sequence[Sequence[float]] | RowMetric


@dataclass(frozen=True)
class Draws:
    """Resampled scores of one method: `by_rows` [draws], mean over its seeds, each on other rows.

    seed_variance  of the mean over its seeds; 0 for one seed, which says nothing about others
    """

    value: float
    by_rows: np.ndarray
    seeds: int
    seed_variance: float


def _read(name: str, scores: Measured) -> tuple[Callable[[np.ndarray | None], np.ndarray], np.ndarray | None]:
    """(score of row numbers, or of all rows for None: `[seeds]`; the matrix `[seeds, rows]` if there is one)."""
    if isinstance(scores, RowMetric):
        metric, every = scores.score, np.arange(scores.rows)
        matrix = None

        def score(rows: np.ndarray | None) -> np.ndarray:
            return np.asarray(metric(every if rows is None else rows), dtype=float).reshape(-1)
    else:
        matrix = _matrix(name, scores)

        def score(rows: np.ndarray | None) -> np.ndarray:
            assert matrix is not None
            return matrix.mean(axis=1) if rows is None else matrix[:, rows].mean(axis=1)

    if row_count(scores) < 2:
        raise UserError(f"{name} has scores of {row_count(scores)} test rows: an interval needs two or more.")
    if not np.isfinite(score(None)).all():
        raise UserError(f"The scores of {name} are not all finite, so they have no interval.")
    return score, matrix


def _matrix(name: str, scores: np.ndarray | Sequence[Sequence[float]]) -> np.ndarray:
    try:
        made = np.asarray(scores, dtype=float)
    except (TypeError, ValueError):
        raise UserError(
            f"The scores of {name} are no numbers [seeds, rows]; every seed needs all rows."
        ) from None
    if made.ndim != 2 or made.shape[0] < 1:
        raise UserError(f"The scores of {name} must be [seeds, rows], not {list(made.shape)}.")
    return made


def mean_score(name: str, scores: Measured) -> float:
    """The score on all rows, mean over seeds; `name` is for the `UserError` of scores that cannot be read."""
    return float(_read(name, scores)[0](None).mean())


def row_count(scores: Measured) -> int:
    """How many test rows the scores are of."""
    return scores.rows if isinstance(scores, RowMetric) else len(scores[0])


def resample(
    table: Mapping[str, Measured], draws: int, generator: np.random.Generator | None = None
) -> dict[str, Draws]:
    """score*_m = mean_s score_ms(I*), one I* of row numbers per draw for all methods m; and what their seeds add.

    table      name -> scores `[seeds, rows]` or `RowMetric`, all over the same rows in the same order
    seeds      v_m = max(0, 2 s^2 - E s*^2) / S_m: the variance between the seeds of m less what the choice of rows
               explains, over their number
    generator  default: seeded by 0, so that equal data give equal results
    Raises `UserError` for scores that are not finite or not `[seeds, rows]`, fewer than two rows, or unlike rows.
    """
    make = generator or np.random.default_rng(0)
    read = {name: _read(name, scores) for name, scores in table.items()}
    n = _same_rows({name: row_count(scores) for name, scores in table.items()})
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in table}
    step = max(1, CHUNK // n)
    for start in range(0, draws, step):
        picked = make.integers(0, n, (min(step, draws - start), n))
        counts = np.stack([np.bincount(rows, minlength=n) for rows in picked]).astype(float)
        for name, (score, matrix) in read.items():
            made = np.stack([score(rows) for rows in picked]) if matrix is None else counts @ matrix.T / n
            drawn[name].append(made)
    joined = {name: np.concatenate(parts) for name, parts in drawn.items()}
    finite = np.logical_and.reduce([np.isfinite(values).all(axis=1) for values in joined.values()])
    if 2 * finite.sum() < draws:
        bad = min(joined, key=lambda name: int(np.isfinite(joined[name]).all(axis=1).sum()))
        raise UserError(f"The score of {bad} is not finite for most resamples of the {n} test rows.")
    return {name: _seeds_apart(read[name][0](None), values[finite]) for name, values in joined.items()}


def _same_rows(numbers: Mapping[str, int]) -> int:
    first = next(iter(numbers))
    for name, n in numbers.items():
        if n != numbers[first]:
            raise UserError(
                f"{first} has scores of {numbers[first]} rows and {name} of {n}: a comparison needs the same ones."
            )
    return numbers[first]


def _seeds_apart(full: np.ndarray, values: np.ndarray) -> Draws:
    """full [seeds], values [draws, seeds]. s*^2 holds the effect of rows twice, s^2 once: 2 s^2 - s*^2 holds none."""
    seeds = len(full)
    if seeds == 1:
        return Draws(float(full[0]), values[:, 0], 1, 0.0)
    between = 2 * float(full.var(ddof=1)) - float(values.var(axis=1, ddof=1).mean())
    return Draws(float(full.mean()), values.mean(axis=1), seeds, max(0.0, between) / seeds)


def with_seeds(
    value: float, by_rows: np.ndarray, methods: Sequence[Draws], rows: int, make: np.random.Generator
) -> np.ndarray:
    """value + (by_rows - value + N(0, v_s)) sqrt(f / chi2_f), f = v^2 / (v_rows^2 / (R - 1) + sum v_m^2 / (S_m - 1)).

    by_rows  [draws] resampled scores, or differences of them, around `value`; v_rows is their variance
    methods  whose seeds take part: v_m = `seed_variance`, v_s their sum, v = v_rows + v_s
    The degrees of freedom f are Satterthwaite's (1946): 2 for three seeds that outweigh the rows, many otherwise.
    """
    variable = [m for m in methods if m.seed_variance > 0]
    if not variable:
        return by_rows
    from_rows, from_seeds = float(by_rows.var()), sum(m.seed_variance for m in variable)
    unsure = from_rows**2 / (rows - 1) + sum(m.seed_variance**2 / (m.seeds - 1) for m in variable)
    freedom = (from_rows + from_seeds) ** 2 / unsure
    noise = math.sqrt(from_seeds) * make.standard_normal(len(by_rows))
    scale: np.ndarray = np.sqrt(freedom / make.chisquare(freedom, len(by_rows)))
    return value + (by_rows - value + noise) * scale
