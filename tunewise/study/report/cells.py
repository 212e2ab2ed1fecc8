"""Numbers as readers of a report want them, and the sentence that a table comes down to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = [
    "COST",
    "amount",
    "duration",
    "finite",
    "interval",
    "megabytes",
    "number_cell",
    "score",
    "size",
    "text_cell",
    "headline",
]

Row = Mapping[str, Any]


def score(value: float) -> str:
    """0.846, 1.23e-05."""
    return f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.3g}"


def amount(value: float) -> str:
    """812, 22.7 M, 1.3 B."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if value >= limit:
            return f"{value / {'B': 1e9, 'M': 1e6, 'k': 1e3}[unit]:.3g} {unit}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """< 0.1 s, 0.4 s, 12 s, 3 min 20 s, 2 h 5 min."""
    if 0 <= seconds < 0.05:
        return "< 0.1 s"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def megabytes(value: float) -> str:
    """A number of MiB: 812 MB, 3.1 GB."""
    return size(value * 2**20)


def size(value: float) -> str:
    """920 B, 1.2 MB, 3.1 GB."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}" if value < 1e3 * limit else f"{value / limit:,.0f} {unit}"
    return f"{value:.0f} B"


# What a row may tell besides its metric: key -> title and how it is written.
COST: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "trainable": ("trainable", amount),
    "peak_memory_mb": ("peak memory", megabytes),
    "seconds": ("time", duration),
    "size_mb": ("on disk", megabytes),
}


def finite(value: Any) -> bool:
    """Whether it is a number that can be shown: no NaN, no infinity, no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def interval(row: Row, metric: str) -> str:
    """ "0.830 to 0.861" from `<metric>_low` and `<metric>_high`; empty if not known."""
    low, high = row.get(f"{metric}_low"), row.get(f"{metric}_high")
    if low is None or high is None or not (finite(low) and finite(high)):
        return ""
    return f"{score(low)} to {score(high)}"


def number_cell(value: Any, write: Callable[[float], str], beside: str = "") -> dict[str, Any]:
    """A cell of a sortable table, blank where there is no number; `beside` stands after it in small."""
    if not finite(value):
        return {"text": "", "value": "", "numeric": True}
    return {"text": write(value), "value": repr(value), "numeric": True, "range": beside}


def text_cell(value: Any) -> dict[str, Any]:
    """A cell of a sortable table, sorted by its text."""
    return {"text": value, "value": value, "numeric": False}


def _named(row: Row, metric: str) -> str:
    low, high = row.get(f"{metric}_low"), row.get(f"{metric}_high")
    interval = "" if low is None or high is None else f" ({score(low)} to {score(high)})"
    return f"{score(row[metric])}{interval}"


def _cheapest_equal(best: Row, others: Sequence[Row], metric: str) -> Row | None:
    """Of the rows whose interval overlaps the best one's, that with the fewest trainable numbers."""
    if best.get(f"{metric}_low") is None or best.get("trainable") is None:
        return None
    low, high = best[f"{metric}_low"], best[f"{metric}_high"]
    near = [
        r
        for r in others
        if r.get(f"{metric}_low") is not None
        and r[f"{metric}_low"] <= high
        and r[f"{metric}_high"] >= low
        and r.get("trainable") is not None
        and r["trainable"] < best["trainable"]
    ]
    return min(near, key=lambda r: r["trainable"], default=None)


def headline(rows: Sequence[Row], metric: str, higher_is_better: bool = True) -> str:
    """One or two sentences: which row is best, and which cheaper one cannot be told apart from it."""
    measured = [r for r in rows if isinstance(r.get(metric), (int, float)) and math.isfinite(r[metric])]
    if not measured:
        return f"No run has a measured {metric}."
    sign = 1 if higher_is_better else -1
    best = max(measured, key=lambda r: sign * r[metric])
    if len(rows) == 1:
        return f"{best['method']} reaches {metric} {_named(best, metric)}."
    extreme = "highest" if higher_is_better else "lowest"
    sentence = f"{best['method']} has the {extreme} {metric}: {_named(best, metric)}."
    equal = _cheapest_equal(best, [r for r in measured if r is not best], metric)
    if equal is None:
        return sentence
    share = equal["trainable"] / best["trainable"]
    return (
        f"{sentence} {equal['method']} reaches {score(equal[metric])}, too close to tell the two apart, "
        f"while training only {100 * share:.2g} % as many parameters."
    )
