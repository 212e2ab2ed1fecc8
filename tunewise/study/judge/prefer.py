"""Which point of the front to take: `--prefer "quality within 1%, then memory"`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tunewise.core.errors import UserError, did_you_mean
from tunewise.study.judge.pareto import COSTS, Objective, Same, as_good, known, quality

__all__ = ["WORDS", "Choice", "Preference", "Term", "choose", "parse_prefer"]

Row = Mapping[str, Any]
QUALITY = "quality"
# What users write -> the field of a row; quality stands for the task's metric.
WORDS: Mapping[str, str] = {
    QUALITY: QUALITY,
    "size": "size_mb",
    "memory": "peak_memory_mb",
    "time": "seconds",
    "parameters": "trainable",
    "inference": "inference_seconds",
    "forgetting": "forgetting",
}
EXAMPLE = '"quality within 1%, then memory"'
AMOUNT = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*(%|percent|points?)")
NOISE = ("noise", "the noise")


@dataclass(frozen=True)
class Term:
    """One word of a preference and how far from the best value of it still counts as equal.

    unit  "%" of the best value, "points" (hundredths of a score between 0 and 1), "noise" (not told apart from
          the best by the data), or None: equal values only
    """

    word: str
    amount: float = 0.0
    unit: Literal["%", "points", "noise"] | None = None


@dataclass(frozen=True)
class Preference:
    """Terms in order: each keeps the rows near enough to the best, the next decides among these."""

    terms: tuple[Term, ...]
    text: str


@dataclass(frozen=True)
class Choice:
    """The row, the sentence that says why, and sentences on rows that could not be considered."""

    row: Row
    sentence: str
    notes: list[str] = field(default_factory=list)


def parse_prefer(text: str) -> Preference:
    """TERM [, then TERM]..., TERM = WORD [within N% | within N points | within the noise].

    Raises `UserError` with the nearest right spelling for unknown words, amounts without a unit, a word that
    comes twice, and a last term with "within", which leaves open what decides.
    """
    plain = " ".join(text.lower().split())
    pieces = re.split(r" ?, ?(?:then )?| then ", plain)
    terms = tuple(_term(piece, text) for piece in pieces)
    words = [term.word for term in terms]
    for word in words:
        if words.count(word) > 1:
            raise UserError(f'"{word}" comes twice in the preference "{text}".')
    if terms[-1].unit is not None:
        other = "memory" if terms[-1].word != "memory" else QUALITY
        raise UserError(f'"{plain}" does not say what decides among those: add for example ", then {other}".')
    return Preference(terms, plain)


def choose(
    rows: Sequence[Row],
    prefer: str | Preference,
    metric: str = "accuracy",
    higher_is_better: bool = True,
    same: Same | None = None,
) -> Choice:
    """argbest of the last term over rows near enough to the best in every earlier one.

    Rows that tie are decided by quality, then by every cost in the order of `COSTS`, then by their order, so the
    choice is on the Pareto front of complete rows. A row that lacks the metric or a value that a term asks for is
    passed over, which `notes` say. `same(row, best)` says for "within the noise" whether two rows cannot be told
    apart; without it the interval of the best (`<metric>_low`, `_high`) decides.
    A word alone means just that: "size" takes the smallest row, however bad; the sentence says what it costs.
    By quality, a lead that rests on one seed yields to the best of the rows with several seeds that cannot be
    told apart from it: the best of many single seeds is mostly luck.
    Raises `UserError` where no row is left, and for points of a metric that is not between 0 and 1.
    """
    wanted = parse_prefer(prefer) if isinstance(prefer, str) else prefer
    goal = quality(metric, higher_is_better)
    named = {QUALITY: goal} | {w: k for w, key in WORDS.items() for k in COSTS if k.key == key}
    asked = [goal, *(named[t.word] for t in wanted.terms if t.word != QUALITY)]
    left, notes = _measured(rows, asked)
    top = min(left, key=lambda row: _cost(row, goal))
    passed: list[str] = []
    if wanted.terms[0].word == QUALITY and (sure := _surer(left, top, goal, same)):
        left = sure
        passed.append("whose lead does not rest on one seed")
    for term in wanted.terms:
        before = len(left)
        left = _near(left, named[term.word], term, same)
        if term.unit is not None and before > 1:
            passed.append(f"{_said(term, goal)} ({len(left)} of {before} methods)")
    order = [goal, *COSTS]
    row = min(left, key=lambda r: [_cost(r, k) for k in order])
    return Choice(row, _sentence(row, top, wanted, named, passed), notes)


def _term(piece: str, text: str) -> Term:
    if not piece:
        raise UserError(f'The preference "{text}" has an empty place; write for example {EXAMPLE}.')
    word, _, rest = piece.partition(" ")
    if word not in WORDS:
        raise UserError(f'Nothing can be preferred by "{word}"{did_you_mean(word, WORDS)}')
    if not rest:
        return Term(word)
    joint, _, within = rest.partition(" ")
    if joint != "within":
        raise UserError(f'"{rest}" after "{word}" is not understood; write for example {EXAMPLE}.')
    if within in NOISE:
        if word != QUALITY:
            raise UserError(f'Only quality has an interval, so "{word} within {within}" means nothing.')
        return Term(word, unit="noise")
    amount = AMOUNT.fullmatch(within)
    if amount is None:
        raise UserError(
            f'"within {within}" is not understood: it needs "1%", "0.5 points" or "the noise", as in {EXAMPLE}.'
        )
    if amount.group(2).startswith("point"):
        if word != QUALITY:
            raise UserError(f'Points are for quality: write "{word} within {amount.group(1)}%".')
        return Term(word, float(amount.group(1)), "points")
    return Term(word, float(amount.group(1)), "%")


def _measured(rows: Sequence[Row], asked: Sequence[Objective]) -> tuple[list[Row], list[str]]:
    left, notes = list(rows), []
    for k in asked:
        lacking = [str(row.get("method")) for row in left if known(row, k) is None]
        left = [row for row in left if known(row, k) is not None]
        if not left:
            raise UserError(f"No row has a measured {k.noun}, so there is none to choose by it.")
        if lacking:
            notes.append(f"Not considered, because their {k.noun} is not known: {', '.join(lacking)}.")
    return left, notes


def _surer(rows: Sequence[Row], top: Row, k: Objective, same: Same | None) -> list[Row]:
    """The rows without those of one seed that lead the best of several seeds; empty where that changes nothing."""
    if not _lone(top):
        return []
    several = [row for row in rows if not _lone(row) and row.get("seeds", 1) > 1]
    rivals = [r for r in several if (as_good(r, top, k) if same is None else same(r, top))]
    if not rivals:
        return []
    best = min(_cost(row, k) for row in rivals)
    return [row for row in rows if not _lone(row) or _cost(row, k) >= best]


def _lone(row: Row) -> bool:
    """Whether another seed would give another score, and there is one only."""
    return row.get("seeds") == 1 and row.get("lr") is not None


def _near(rows: Sequence[Row], k: Objective, term: Term, same: Same | None) -> list[Row]:
    best = min(rows, key=lambda row: _cost(row, k))
    value = known(best, k)
    assert value is not None
    if term.unit == "noise":
        return [r for r in rows if r is best or (as_good(r, best, k) if same is None else same(r, best))]
    if term.unit == "points" and not 0 <= value <= 1:
        raise UserError(
            f"Points are for scores between 0 and 1, and {k.noun} is {k.show(value)}: use a % instead."
        )
    slack = {"%": abs(value) * term.amount / 100, "points": term.amount / 100}.get(term.unit or "", 0.0)
    # 0.85 - 0.84 is not quite 0.01 in floating point.
    slack *= 1 + 1e-9
    return [row for row in rows if _cost(row, k) <= _cost(best, k) + slack]


def _cost(row: Row, k: Objective) -> float:
    value = known(row, k)
    if value is None:
        return float("inf")
    return -value if k.higher_is_better else value


def _said(term: Term, goal: Objective) -> str:
    noun = goal.noun if term.word == QUALITY else term.word
    if term.unit == "noise":
        return f"that cannot be told apart from the best {noun}"
    amount = f"{term.amount:g}" + ("%" if term.unit == "%" else " points")
    return f"within {amount} of the best {noun}"


def _sentence(
    row: Row, top: Row, wanted: Preference, named: Mapping[str, Objective], passed: Sequence[str]
) -> str:
    goal, last = named[QUALITY], named[wanted.terms[-1].word]
    extreme = "highest" if last.higher_is_better else "lowest"
    value, best = known(row, goal), known(top, goal)
    shown = known(row, last)
    assert value is not None and best is not None and shown is not None
    among = f" of those {', then '.join(passed)}" if passed else ""
    said = f"{row.get('method')} has the {extreme} {last.noun}{among}: {last.show(shown)}"
    if last is goal and row is not top:
        return f"{said}; {top.get('method')} has {goal.show(best)}."
    if row is top:
        return f"{said}." if last is goal else f"{said}; its {goal.noun} is the best, {goal.show(value)}."
    return (
        f"{said}; its {goal.noun} is {goal.show(value)}, the best is {goal.show(best)} ({top.get('method')})."
    )
