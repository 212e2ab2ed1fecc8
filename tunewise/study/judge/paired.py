"""The paired tests of a study: which methods its test rows tell apart, and what is cheaper among the equal ones."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tunewise.study.judge import pareto
from tunewise.study.judge.measured import Finalist, number
from tunewise.study.judge.resample import Measured, RowMetric, mean_score
from tunewise.study.judge.row_scores import TestRows
from tunewise.study.judge.statistics import Comparison, Difference, best_of, compare_to

__all__ = ["FIXED", "TESTED", "PairedTests", "scores_of"]

Row = dict[str, Any]
FIXED = "lora"
"""The method that others are tested against beside the best: chosen beforehand, not by the test rows."""

TESTED = ("difference", "low", "high", "p", "verdict")
"""What a row keeps of a test."""

RANGES: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(
        ("accuracy", "macro_f1", "balanced_accuracy", "token_accuracy", "exact_match"), (0.0, 1.0)
    ),
    **dict.fromkeys(("matthews", "pearson", "spearman"), (-1.0, 1.0)),
    **dict.fromkeys(("rmse", "mae", "loss"), (0.0, math.inf)),
    "perplexity": (1.0, math.inf),
}
"""What values the metrics of the tasks can have."""

# Less than a tenth saved is no reason to take another method.
CHEAPER = 0.9
# p of the closest rival from which on a best owes next to nothing to having been picked.
CLEAR = 0.01


def scores_of(
    rows: Sequence[Row], finalists: Sequence[Finalist], reader: TestRows
) -> tuple[dict[str, Measured], list[str]]:
    """(method -> scores on test rows in the order of `rows`, sentences on methods that have none).

    A method is left out where its kept test rows do not give its measured value again: a function of the
    user's own may have the name of a metric. Raises `UserError` for test rows that differ between trials.
    """
    metric, found, without = reader.metric, dict[str, Measured](), list[str]()
    if not reader.known:
        return {}, [
            f"{metric} cannot be computed again from the kept test rows: its intervals are those of the runs, "
            "over test rows alone, and no paired tests were made."
        ]
    trials = {f.method: f.trials for f in finalists}
    for row in rows:
        method, value = row["method"], number(row.get(metric))
        if value is None:
            continue
        scores = reader.scores(trials[method])
        if scores is not None and math.isclose(mean_score(method, scores), value, rel_tol=1e-6, abs_tol=1e-9):
            found[method] = scores
        else:
            without.append(method)
    notes = [
        f"Not in the paired tests, since the kept test rows do not give the measured {metric}: "
        f"{', '.join(without)}."
    ]
    return found, notes if without else []


class PairedTests:
    """Every method against the best and against `lora`, on the same test rows; each comparison is made once.

    best   the comparison against the best method; None without any scores
    fixed  names of what no seed changes
    """

    def __init__(
        self, scores: Mapping[str, Measured], metric: str, higher_is_better: bool, fixed: Collection[str] = ()
    ) -> None:
        self.scores = {name: _remembered(one) for name, one in scores.items()}
        self.metric, self.up, self.seedless = metric, higher_is_better, frozenset(fixed)
        self._made: dict[str, Comparison] = {}
        self.best = self.against(best_of(scores, higher_is_better)) if scores else None
        self.fixed = self.against(FIXED) if FIXED in scores else None

    def against(self, method: str) -> Comparison:
        """All methods against this one."""
        if method not in self._made:
            self._made[method] = compare_to(
                method,
                self.scores,
                higher_is_better=self.up,
                fixed=self.seedless,
                bounds=RANGES[self.metric],
            )
        return self._made[method]

    def fill(self, row: Row) -> None:
        """Adds the interval over rows and seeds, `vs_best` and `vs_lora`."""
        method, metric = row["method"], self.metric
        row["vs_best"] = row["vs_lora"] = None
        if self.best is None or method not in self.scores:
            return
        found = self.best.intervals[method]
        row |= {metric: found.value, f"{metric}_low": found.low, f"{metric}_high": found.high}
        if method != self.best.against:
            row["vs_best"] = _kept(self.best[method])
        if self.fixed is not None and method != FIXED:
            row["vs_lora"] = _kept(self.fixed[method])

    def same(self, row: Mapping[str, Any], best: Mapping[str, Any]) -> bool:
        """Whether two rows are not told apart; of a row without scores the interval of the second decides."""
        if row["method"] in self.scores and best["method"] in self.scores:
            return self.against(best["method"])[row["method"]].verdict == "not told apart"
        return pareto.as_good(row, best, pareto.quality(self.metric, self.up))

    def notes(self) -> Iterator[str]:
        """That the best was picked by the rows that it is measured on, where that may matter."""
        if self.best is None or all(d.p_alone < CLEAR for d in self.best.differences):
            return
        name = self.best.against
        said = (
            f"{name} is the best on the same test rows that its {self.metric} is of: by this choice it looks "
            "a little too good, and methods that equal it are called worse more often than one time in 20"
        )
        fixed = self.fixed is not None and name != FIXED
        yield said + (f"; tests against {FIXED}, fixed beforehand, are free of that." if fixed else ".")

    def cheaper(self, rows: Sequence[Row]) -> Iterator[str]:
        """For each cost the cheapest of the methods that are not told apart from the best."""
        if self.best is None:
            return
        by_name = {row["method"]: row for row in rows}
        top = by_name[self.best.against]
        near = [by_name[d.method] for d in self.best.differences if d.verdict == "not told apart"]
        gains: dict[str, list[str]] = {}
        for cost in (k for k in pareto.COSTS if k.ratio):
            value = pareto.known(top, cost)
            known = [(v, str(row["method"])) for row in near if (v := pareto.known(row, cost)) is not None]
            if value is None or not known:
                continue
            least, method = min(known, key=lambda pair: pair[0])
            if least < CHEAPER * value:
                share = cost.less.format(f"{least / value:.2g}") if least > 0 else cost.none
                gains.setdefault(method, []).append(share)
        if gains:
            listed = "; ".join(f"{method} {_listed(shares)}" for method, shares in gains.items())
            yield f"As good as {top['method']} within the noise, and cheaper: {listed}."


def _remembered(scores: Measured) -> Measured:
    """The same scores, each resample computed once: all comparisons of a study draw the same rows."""
    if not isinstance(scores, RowMetric):
        return scores
    metric, made = scores.score, dict[bytes, Any]()

    def score(rows: np.ndarray) -> Any:
        # Draws that agree in their first 64 rows agree in all.
        key = rows[:64].tobytes()
        if key not in made:
            made[key] = metric(rows)
        return made[key]

    return RowMetric(score, scores.rows)


def _kept(found: Difference) -> Row:
    return {name: getattr(found, name) for name in TESTED}


def _listed(items: Sequence[str]) -> str:
    return " and ".join([*([", ".join(items[:-1])] if items[1:] else []), items[-1]])
