"""Which rows of a comparison are worth having: the Pareto front, and why the others are not on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunewise.core.errors import UserError
from tunewise.study.report.cells import amount as counted
from tunewise.study.report.cells import duration, megabytes
from tunewise.study.report.cells import score as written

__all__ = ["COSTS", "Front", "Objective", "as_good", "dominated_by", "dominates", "front", "known", "quality"]

Row = Mapping[str, Any]
Same = Callable[[Row, Row], bool]


@dataclass(frozen=True)
class Objective:
    """One thing to have more or less of.

    key     the row's field; where `required`, a row without it cannot be on the front (it failed)
    noun    its name in sentences
    less    what a row that has less of it does, with a place for the share: "needs {} of the memory"
    none    the same for nothing at all
    show    how its values are written
    ratio   whether "0.4 of" means something; forgetting may be 0 or negative
    """

    key: str
    noun: str
    higher_is_better: bool = False
    required: bool = False
    less: str = ""
    none: str = ""
    show: Callable[[float], str] = written
    ratio: bool = True


def quality(metric: str, higher_is_better: bool = True) -> Objective:
    """The task's metric as an objective, which every row on the front must have."""
    return Objective(metric, metric, higher_is_better, required=True)


COSTS = (
    Objective(
        "peak_memory_mb", "peak memory", less="needs {} of the memory", none="needs no memory", show=megabytes
    ),
    Objective(
        "seconds", "training time", less="trains in {} of the time", none="needs no time", show=duration
    ),
    Objective(
        "trainable",
        "trainable parameters",
        less="trains {} of the parameters",
        none="trains no parameters",
        show=counted,
    ),
    Objective(
        "size_mb",
        "size on disk",
        less="takes {} of the disk space",
        none="takes no disk space",
        show=megabytes,
    ),
    Objective(
        "inference_seconds",
        "inference time",
        less="predicts in {} of the time",
        none="predicts in no time",
        show=lambda seconds: f"{seconds:.3g} s",
    ),
    Objective("forgetting", "forgetting", less="forgets less", ratio=False),
)


@dataclass(frozen=True)
class Front:
    """`on` and `off` share all rows, each in the given order; `why[i]` says why `off[i]` is not on the front.

    notes  sentences about values that are missing; `objectives` are those that at least one row has
    """

    on: list[Row]
    off: list[Row]
    why: list[str]
    objectives: list[Objective]
    notes: list[str] = field(default_factory=list)


def known(row: Row, objective: Objective) -> float | None:
    """The row's value, or None where it is missing, NaN or infinite. Raises `UserError` for what is no number."""
    value = row.get(objective.key)
    if value is None:
        return None
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise UserError(f"The {objective.key} of {row.get('method')} must be a number, not {value!r}.")
    number = float(value)
    return number if math.isfinite(number) else None


def dominates(a: Row, b: Row, objectives: Sequence[Objective]) -> bool:
    """a_k >= b_k for every objective k and a_k > b_k for one, in its good direction; missing is below all values."""
    gains = [_gain(a, k) - _gain(b, k) if _gain(a, k) != _gain(b, k) else 0.0 for k in objectives]
    return all(g >= 0 for g in gains) and any(g > 0 for g in gains)


def front(rows: Sequence[Row], objectives: Sequence[Objective]) -> Front:
    """{a : no b dominates a}; rows that are equal in everything are all kept.

    rows  one dict per method with `method` and the objectives' fields. A missing value counts as worse than any
          known one, so that it never brings a row onto the front; a row without a required one is off. Both are
          said in `notes`. Raises `UserError` for values that are no numbers and for no objectives at all.
    """
    if not objectives:
        raise UserError("A Pareto front needs at least one objective.")
    used = [k for k in objectives if any(known(row, k) is not None for row in rows)]
    notes = [f"No row has a measured {k.noun}, so it is no objective." for k in objectives if k not in used]
    for k in used:
        lacking = [str(row.get("method")) for row in rows if known(row, k) is None]
        if lacking:
            what = "cannot be on the front" if k.required else "cannot be on the front for it"
            notes.append(f"{k.noun} is not known of {', '.join(lacking)}: without it a row {what}.")
    on, off, why = [], [], []
    required = [k for k in objectives if k.required]
    complete = [row for row in rows if all(known(row, k) is not None for k in required)]
    for row in rows:
        lacks = [k.noun for k in required if known(row, k) is None]
        # Of all that dominate it, one that is on the front itself is the one to look at.
        better = [other for other in complete if dominates(other, row, used)]
        better = [o for o in better if not any(dominates(b, o, used) for b in better)]
        if lacks:
            off.append(row)
            why.append(f"{row.get('method')} has no measured {' or '.join(lacks)}.")
        elif better:
            off.append(row)
            why.append(f"{_advantage(better[0], row, used)}.")
        else:
            on.append(row)
    return Front(on, off, why, used, notes)


def as_good(a: Row, b: Row, objective: Objective) -> bool:
    """a is at least b, or within b's interval (`<key>_low` to `<key>_high`) where the row has one."""
    one, other = known(a, objective), known(b, objective)
    if one is None or other is None:
        return False
    if objective.higher_is_better:
        return one >= _bound(b, f"{objective.key}_low", other)
    return one <= _bound(b, f"{objective.key}_high", other)


def dominated_by(
    row: Row, rows: Sequence[Row], objectives: Sequence[Objective], same: Same | None = None
) -> list[str]:
    """Sentences on every row that is as good as this one within its interval and cheaper, or better in all.

    "lora(rank=2) is as good within the interval and needs 0.4 of the memory". Costs must be known of both rows,
    no cost may be higher and one must be lower. `same(other, row)` says whether two qualities cannot be told
    apart (a paired test); without it the intervals of the row decide.
    """
    qualities = [k for k in objectives if k.required]
    costs = [k for k in objectives if not k.required and known(row, k) is not None]
    said = []
    for other in rows:
        if other is row or any(known(other, k) is None for k in (*qualities, *costs)):
            continue
        near = all(
            _gain(other, k) >= _gain(row, k) or (as_good(other, row, k) if same is None else same(other, row))
            for k in qualities
        )
        if near and dominates(other, row, costs) or dominates(other, row, [*qualities, *costs]):
            said.append(f"{_advantage(other, row, [*qualities, *costs])}.")
    return said


def _gain(row: Row, objective: Objective) -> float:
    value = known(row, objective)
    if value is None:
        return -math.inf
    return value if objective.higher_is_better else -value


def _bound(row: Row, key: str, otherwise: float) -> float:
    value = row.get(key)
    return float(value) if value is not None and math.isfinite(value) else otherwise


def _advantage(winner: Row, loser: Row, objectives: Sequence[Objective]) -> str:
    """ "lora is as good and needs 0.4 of the memory": what the winner has over the loser, the first two gains."""
    said = []
    for k in objectives:
        won, lost = known(winner, k), known(loser, k)
        if k.required and won is not None and lost is not None:
            gap = _gain(winner, k) - _gain(loser, k)
            equal = "is as good" if gap == 0 else "is as good within the interval"
            said.append(f"is better ({written(won)} against {written(lost)})" if gap > 0 else equal)
    gains = [
        _cheaper(winner, loser, k)
        for k in objectives
        if not k.required and _gain(winner, k) > _gain(loser, k)
    ]
    return f"{winner.get('method')} {' and '.join([*said, *gains[:2]])}"


def _cheaper(winner: Row, loser: Row, k: Objective) -> str:
    won, lost = known(winner, k), known(loser, k)
    assert won is not None
    if lost is None:
        return f"has a known {k.noun} ({k.show(won)})"
    if not k.less:
        return (
            f"has {'more' if k.higher_is_better else 'less'} {k.noun} ({k.show(won)} against {k.show(lost)})"
        )
    if not k.ratio or lost <= 0 or won < 0:
        return f"{k.less} ({k.show(won)} against {k.show(lost)})" if not k.ratio else f"has less {k.noun}"
    return k.less.format(_share(won / lost)) if won > 0 else k.none


def _share(value: float) -> str:
    """0.4, 0.05, 0.99; never a rounded 1."""
    return f"{value:.1g}" if value < 0.95 else f"{min(value, 0.99):.2f}"
