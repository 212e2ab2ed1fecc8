"""How sure a comparison is: intervals over test rows and seeds, paired tests, and how many rows would be enough.

The resampling is in `resample.py`. Why seeds must count beside rows: Bouthillier et al. 2021, arXiv 2103.03098;
why a name for "cannot be told apart" is needed: Agarwal et al. 2021, arXiv 2108.13264.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from tunewise.core.errors import UserError, did_you_mean
from tunewise.study.judge.resample import (
    Draws,
    Measured,
    RowMetric,
    mean_score,
    resample,
    row_count,
    with_seeds,
)
from tunewise.study.judge.seed_noise import Source

__all__ = [
    "Comparison",
    "Difference",
    "Interval",
    "RowMetric",
    "best_of",
    "compare_to",
    "holm",
    "interval",
    "mcnemar",
    "paired_difference",
    "rows_needed",
]

Judgement = Literal["better", "worse", "not told apart"]
LEAST_DRAWS, DRAWS_PER_METHOD = 2000, 80
POWER = 0.8
Range = tuple[float, float]
ANY: Range = (-math.inf, math.inf)


@dataclass(frozen=True)
class Interval:
    """A score, its mean over seeds, with the interval that another draw of rows and seeds would give.

    draws  the resamples that it rests on
    noise  where the effect of seeds is from: "measured" with this method's own and the others', "lent" by the
           others to one seed; "none" for what no seed changes; "unknown" if there is one seed of each method:
           then it is not in the interval
    """

    value: float
    low: float
    high: float
    rows: int
    seeds: int
    draws: int
    noise: Source


@dataclass(frozen=True)
class Difference:
    """`method` - `against`, on the same test rows, in the metric's own unit.

    low, high    the interval of this difference alone
    p            two-sided, after Holm's correction for all methods compared; `p_alone` before it
    verdict      what p says at the level of the comparison, in the direction that is good for the metric
    test         "bootstrap", or "exact McNemar" for right-or-wrong scores of one seed each without noise of seeds
    rows_needed  test rows that would tell the two apart, were the true difference the measured one;
                 None where they are told apart already, and where no number of rows would do
    """

    method: str
    against: str
    difference: float
    low: float
    high: float
    p: float
    p_alone: float
    verdict: Judgement
    test: str
    rows_needed: int | None


@dataclass(frozen=True)
class Comparison:
    """One method against all others: `differences` in the order of the table, an `Interval` for each method."""

    against: str
    higher_is_better: bool
    level: float
    rows: int
    intervals: dict[str, Interval]
    differences: list[Difference] = field(default_factory=list)

    def __getitem__(self, method: str) -> Difference:
        for found in self.differences:
            if found.method == method:
                return found
        raise KeyError(method)


def interval(
    scores: Measured,
    *,
    level: float = 0.95,
    draws: int = LEAST_DRAWS,
    generator: np.random.Generator | None = None,
    bounds: Range = ANY,
) -> Interval:
    """The outer (1 - level)/2 quantiles of mean_s score_s(I*) with the noise of seeds, I* rows drawn with replacement.

    scores     one score per seed and row `[seeds, rows]`, or a `RowMetric`
    generator  default: seeded by 0, so that equal data give equal intervals
    bounds     lowest and highest value that the metric can have; the interval ends there

    For right-or-wrong scores of one seed it is Wilson's interval, as in the runs. Raises `UserError` for scores
    that are not finite, are not `[seeds, rows]`, or have fewer than two rows.
    """
    make = generator or np.random.default_rng(0)
    drawn = resample({"scores": scores}, draws, make)["scores"]
    return _interval(scores, drawn, level, row_count(scores), make, bounds)


def compare_to(
    best: str,
    table: Mapping[str, Measured],
    *,
    higher_is_better: bool = True,
    level: float = 0.95,
    draws: int | None = None,
    generator: np.random.Generator | None = None,
    fixed: Collection[str] = (),
    bounds: Range = ANY,
) -> Comparison:
    """d_m = score_m - score_best on the same resampled rows, for every other method m of the table; Holm's p.

    table  name -> scores `[seeds, rows]` or `RowMetric`, all over the same test rows in the same order; the
           numbers of seeds may differ. Seeds of two methods are independent draws, never pairs.
    draws  default: enough for Holm's correction to reach 1 - level in every comparison
    fixed  names of what no seed changes (a baseline, a probe solved in one go): it gets no noise of seeds; names
           that are not in the table are passed over
    bounds lowest and highest value that the metric can have; intervals end there, those of differences likewise

    What a seed changes is estimated from all methods together (`seed_noise.py`), one seed of a method borrows it.
    Where `best` is picked by these same rows (`best_of`), it is too high by chance, and methods that are equal are
    told apart about twice as often as the level promises; a reference fixed beforehand has no such excess.
    Raises `UserError` for an unknown name, rows that differ in number, and scores that are not finite.
    """
    if best not in table:
        raise UserError(f'There are no scores of the method "{best}"{did_you_mean(best, table)}')
    names = [name for name in table if name != best]
    make = generator or np.random.default_rng(0)
    drawn = resample(table, draws or max(LEAST_DRAWS, DRAWS_PER_METHOD * len(names)), make, fixed)
    rows, reference = row_count(table[best]), drawn[best]
    gaps = {name: _gap(drawn[name], reference, rows, make) for name in names}
    seeded = {name for name in table if drawn[name].noise.variance > 0}
    alone = [_tested(table[name], table[best], gaps[name], not seeded & {name, best}) for name in names]
    corrected = holm([p for p, _ in alone])
    alpha = (1 - level) / max(1, len(names))
    furthest = (bounds[0] - bounds[1], bounds[1] - bounds[0])
    found = []
    for name, (p_alone, test), p in zip(names, alone, corrected, strict=True):
        value, (low, high) = drawn[name].value - reference.value, _ends(gaps[name], level, furthest)
        judged: Judgement = "not told apart"
        if p < 1 - level:
            judged = "better" if (value > 0) == higher_is_better else "worse"
        needed = _needed(drawn[name], reference, rows, alpha) if judged == "not told apart" else None
        found.append(Difference(name, best, value, low, high, p, p_alone, judged, test, needed))
    intervals = {name: _interval(table[name], drawn[name], level, rows, make, bounds) for name in table}
    return Comparison(best, higher_is_better, level, rows, intervals, found)


def paired_difference(
    first: Measured,
    second: Measured,
    *,
    higher_is_better: bool = True,
    level: float = 0.95,
    draws: int = LEAST_DRAWS,
    generator: np.random.Generator | None = None,
    bounds: Range = ANY,
) -> Difference:
    """score(first) - score(second) on the same test rows, with interval and p; see `compare_to`."""
    table = {"first": first, "second": second}
    options: dict[str, Any] = {"level": level, "draws": draws, "generator": generator, "bounds": bounds}
    return compare_to("second", table, higher_is_better=higher_is_better, **options)["first"]


def best_of(table: Mapping[str, Measured], higher_is_better: bool = True) -> str:
    """The name with the best mean over seeds; of equal ones the first. Raises `UserError` if there is none."""
    if not table:
        raise UserError("There are no scores to choose the best of.")
    sign = 1 if higher_is_better else -1
    means = {name: mean_score(name, scores) for name, scores in table.items()}
    return max(means, key=lambda name: sign * means[name])


def mcnemar(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> float:
    """p = min(1, 2 P(X <= min(b, c))), X ~ Binomial(b + c, 1/2); b, c rows that only one of the two gets right.

    Scores are 0 or 1, `[rows]` each. Exact two-sided test: McNemar 1947; Dietterich 1998 on its use here.
    """
    a, b = np.asarray(first, dtype=float).ravel(), np.asarray(second, dtype=float).ravel()
    if a.shape != b.shape or not (_is_binary(a) and _is_binary(b)):
        raise UserError("McNemar's test needs right (1) or wrong (0) of two methods on the same rows.")
    only_first, only_second = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    n, total, ways = only_first + only_second, 0, 1
    for k in range(min(only_first, only_second) + 1):
        total += ways
        ways = ways * (n - k) // (k + 1)
    return min(1.0, 2 * total / 2**n)


def holm(p_values: Sequence[float]) -> list[float]:
    """p'_(i) = max_(j <= i) min(1, (m - j + 1) p_(j)) in the given order; Holm 1979."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for place, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[i]))
        corrected[i] = largest
    return corrected


def rows_needed(
    difference: float, rows: int, row_variance: float, seed_variance: float = 0.0, alpha: float = 0.05
) -> int | None:
    """n = rows z^2 v_rows / (d^2 - z^2 v_seeds), z = z_(1 - alpha/2) + z_0.8: rows for a power of 80 %.

    row_variance   of the measured difference through the choice of `rows` rows; it shrinks as 1 / rows
    seed_variance  of the difference through seeds, which more rows do not reduce
    None where no number of rows is enough: no difference, or seeds that move it as much as it is.
    """
    z = NormalDist().inv_cdf(1 - alpha / 2) + NormalDist().inv_cdf(POWER)
    room = difference**2 - z**2 * seed_variance
    return math.ceil(rows * z**2 * row_variance / room) if room > 0 else None


def _is_binary(scores: np.ndarray) -> bool:
    return bool(np.isin(scores, (0.0, 1.0)).all())


def _interval(
    scores: Measured, drawn: Draws, level: float, rows: int, make: np.random.Generator, bounds: Range
) -> Interval:
    low, high = _ends(with_seeds(drawn.value, drawn.by_rows, [drawn], rows, make), level, bounds)
    if not isinstance(scores, RowMetric):
        matrix, seeded = np.asarray(scores, dtype=float), drawn.noise.variance > 0
        # Rows that are all right or all wrong resample to themselves and would seem certain.
        if _is_binary(matrix) and (drawn.seeds == 1 or np.ptp(matrix) == 0):
            least, most = _wilson(drawn.value, rows, level)
            low, high = (min(low, least), max(high, most)) if seeded else (least, most)
    return Interval(drawn.value, low, high, rows, drawn.seeds, len(drawn.by_rows), drawn.noise.source)


def _wilson(p: float, n: int, level: float) -> tuple[float, float]:
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def _ends(values: np.ndarray, level: float, bounds: Range) -> Range:
    low, high = np.clip(np.quantile(values, [(1 - level) / 2, (1 + level) / 2]), *bounds)
    return float(low), float(high)


def _gap(first: Draws, second: Draws, rows: int, make: np.random.Generator) -> np.ndarray:
    """[draws] of first - second. Sums of the same numbers in another order differ by rounding: those are ties."""
    value = first.value - second.value
    gap = with_seeds(value, first.by_rows - second.by_rows, (first, second), rows, make)
    gap[np.abs(gap) < 1e-12 * (1 + abs(first.value) + abs(second.value))] = 0.0
    return gap


def _tested(a: Measured, b: Measured, gap: np.ndarray, rows_alone: bool) -> tuple[float, str]:
    """(two-sided p, the test's name); rows_alone: no noise of seeds is in the gap"""
    if rows_alone and not isinstance(a, RowMetric) and not isinstance(b, RowMetric) and len(a) == len(b) == 1:
        one, other = np.asarray(a, dtype=float)[0], np.asarray(b, dtype=float)[0]
        if _is_binary(one) and _is_binary(other):
            return mcnemar(one, other), "exact McNemar"
    least = min(int((gap <= 0).sum()), int((gap >= 0).sum()))
    return min(1.0, 2 * (least + 1) / (len(gap) + 1)), "bootstrap"


def _needed(first: Draws, second: Draws, rows: int, alpha: float) -> int | None:
    shared = float((first.by_rows - second.by_rows).var())
    seeds = first.noise.variance + second.noise.variance
    needed = rows_needed(first.value - second.value, rows, shared, seeds, alpha)
    return None if needed is None else max(needed, rows + 1)
