"""Scores resampled over test rows and seeds, the same rows for every method, so that differences are paired.

Rows are drawn with replacement (Efron and Tibshirani 1993; paired: Koehn 2004). Seeds are few: drawing three of them
with replacement gives intervals that miss one time in five. So their effect comes from a t distribution instead, by
the random-effects estimate of its size (rows and seeds are crossed: Owen 2007, "The pigeonhole bootstrap"), which
the methods of a table share as far as their seeds are alike (`seed_noise.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tunewise.core.errors import UserError
from tunewise.study.judge.seed_noise import SeedNoise, Spread, moderated

__all__ = ["Draws", "Measured", "RowMetric", "mean_score", "resample", "row_count", "with_seeds"]

CHUNK = 2_000_000
# A variance this small against the squared score is no difference between seeds.
ROUNDING = 1e-24


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

    noise  what other seeds would change beside that
    """

    value: float
    by_rows: np.ndarray
    seeds: int
    noise: SeedNoise


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
    table: Mapping[str, Measured],
    draws: int,
    generator: np.random.Generator | None = None,
    fixed: Collection[str] = (),
) -> dict[str, Draws]:
    """score*_m = mean_s score_ms(I*), one I* of row numbers per draw for all methods m; and what their seeds add.

    table      name -> scores `[seeds, rows]` or `RowMetric`, all over the same rows in the same order
    seeds      the variance s^2 between those of m, of which the choice of rows explains E s*^2 - s^2, moderated
               over all methods (`moderated`)
    generator  default: seeded by 0, so that equal data give equal results
    fixed      names in the table of what no seed changes: a single measurement of these has no noise of seeds
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
    full = {name: read[name][0](None) for name in table}
    kept = {name: values[finite] for name, values in joined.items()}
    noises = moderated([_spread(full[name], kept[name], name in fixed) for name in table])
    return {
        name: Draws(float(full[name].mean()), kept[name].mean(axis=1), len(full[name]), noise)
        for name, noise in zip(table, noises, strict=True)
    }


def _same_rows(numbers: Mapping[str, int]) -> int:
    first = next(iter(numbers))
    for name, n in numbers.items():
        if n != numbers[first]:
            raise UserError(
                f"{first} has scores of {numbers[first]} rows and {name} of {n}: a comparison needs the same ones."
            )
    return numbers[first]


def _spread(full: np.ndarray, values: np.ndarray, fixed: bool) -> Spread:
    """full [seeds], values [draws, seeds]: s*^2 holds the effect of rows twice, s^2 once."""
    if len(full) == 1:
        return Spread(1, fixed=fixed)
    between, drawn = float(full.var(ddof=1)), float(values.var(axis=1, ddof=1).mean())
    if max(between, drawn) < ROUNDING * float(full.mean()) ** 2:
        return Spread(len(full), fixed=fixed)
    return Spread(len(full), between, max(0.0, drawn - between), fixed)


def with_seeds(
    value: float, by_rows: np.ndarray, methods: Sequence[Draws], rows: int, make: np.random.Generator
) -> np.ndarray:
    """value + (by_rows - value + N(0, v_s)) sqrt(f / chi2_f), f = v^2 / (v_rows^2 / (R - 1) + sum (own) + shared).

    by_rows  [draws] resampled scores, or differences of them, around `value`; v_rows is their variance
    methods  whose seeds take part: v_s is the sum of the variances of their noise, v = v_rows + v_s
    The degrees of freedom f are Satterthwaite's (1946): own = sum size_m^2 own_m of the single methods, and
    shared = (sum size_m shared_m^(1/2))^2, since they err together in what they have from each other.
    """
    noises = [m.noise for m in methods if m.noise.variance > 0]
    if not noises:
        return by_rows
    from_rows, from_seeds = float(by_rows.var()), sum(n.variance for n in noises)
    unsure = from_rows**2 / (rows - 1) + sum(n.size**2 * n.own for n in noises)
    unsure += sum(n.size * math.sqrt(n.shared) for n in noises) ** 2
    # Scores that move together over rows can differ by less than the parts of the estimate: these bound it.
    freedom = max(from_rows + from_seeds, sum(n.size for n in noises)) ** 2 / unsure
    noise = math.sqrt(from_seeds) * make.standard_normal(len(by_rows))
    scale: np.ndarray = np.sqrt(freedom / make.chisquare(freedom, len(by_rows)))
    return value + (by_rows - value + noise) * scale
