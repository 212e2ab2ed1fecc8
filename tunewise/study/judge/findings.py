"""What a study found: the decision in words, its choice, one row per method with paired tests, what it cost."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunewise.core.errors import UserError
from tunewise.study.disk import to_json
from tunewise.study.judge import pareto
from tunewise.study.judge.measured import (
    Finalist,
    command,
    failures,
    finalists,
    leaders,
    number,
    settings,
    tuning,
    used,
    validation_metric,
)
from tunewise.study.judge.paired import TESTED, PairedTests, scores_of
from tunewise.study.judge.prefer import Choice, choose, parse_prefer
from tunewise.study.judge.row_scores import TestRows
from tunewise.study.judge.sentences import verdict
from tunewise.study.report.cells import score as written
from tunewise.study.schedule import MEASURE
from tunewise.study.store import Store
from tunewise.study.tables import Trial

__all__ = ["findings", "front", "table"]

Row = dict[str, Any]
# Lines of the study's diary that a reader of the results should know.
TOLD = ("note", "memory", "left out")
# Methods that leave the pretrained model as it is, so that they answer whether changing it is worth it.
PROBE = re.compile(r"(linear_probe|head_only)(\([^()]*\))?")


def findings(store: Store, *, prefer: str | None = None) -> dict[str, Any]:
    """JSON-ready: decision, choice, rows (one per method, best first), trials, failed, settings, spent, notes.

    prefer  which point is chosen (see `parse_prefer`); default: that of the study, else "quality"
    `metric` names the field that the rows are ordered by: the task's metric on test rows, or `valid/<metric>` as
    long as no tuned method was measured on these; then nothing is tested or chosen. Directories are relative to
    the study's folder. Raises `UserError` for a study without facts, test rows that differ between trials, and a
    preference that chooses nothing.
    """
    facts = store.get("facts")
    if facts is None:
        raise UserError(f"The study {store.folder} ended before its first trial: there is nothing to tell.")
    trials = store.trials()
    score_name, score_up = validation_metric(trials, facts["metric"], facts["higher_is_better"])
    done, notes = finalists(trials, score_up)
    diary = [event["text"] for event in store.events() if event["kind"] in TOLD]
    view = _View(store, facts, trials, done, [*store.get("notes", []), *diary, *notes])
    tuned = any(f.kind != "baseline" for f in done)
    found = view.decided(prefer) if tuned else view.undecided(score_name, score_up)
    ready: dict[str, Any] = json.loads(to_json({**found, **view.ledger()}))
    return ready


def table(found: Mapping[str, Any]) -> Any:
    """A DataFrame, one flat row per method in the order of the findings; of `vs_best` the p is `vs_best_p`."""
    import pandas as pd

    rows = []
    for row in found["rows"]:
        flat = {key: value for key, value in row.items() if key not in ("vs_best", "vs_lora")}
        for key in ("vs_best", "vs_lora"):
            flat |= {f"{key}_{name}": (row[key] or {}).get(name) for name in TESTED}
        rows.append(flat)
    return pd.DataFrame(rows, columns=list(dict.fromkeys(["method", *(k for row in rows for k in row)])))


def front(found: Mapping[str, Any]) -> Any:
    """The rows of `table` that no other beats in everything: the Pareto front."""
    on = {**found, "rows": [row for row in found["rows"] if row["front"]]}
    return table(on)


@dataclass
class _View:
    """One study as it stands; `notes` grow while it is looked at."""

    store: Store
    facts: Mapping[str, Any]
    trials: Sequence[Trial]
    done: Sequence[Finalist]
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.metric, self.up = str(self.facts["metric"]), bool(self.facts["higher_is_better"])
        self.goal = pareto.quality(self.metric, self.up)

    def decided(self, prefer: str | None) -> dict[str, Any]:
        """Tuned methods have been measured on test rows."""
        rows = self._measured_rows(self.done)
        scores, notes = scores_of(rows, self.done, TestRows(self.store, self.facts))
        # A baseline, and what is solved without a learning rate, comes out the same with every seed.
        fixed = [row["method"] for row in rows if row["kind"] == "baseline" or row["lr"] is None]
        tests = PairedTests(scores, self.metric, self.up, fixed)
        for row in rows:
            tests.fill(row)
        shown = pareto.front(rows, [self.goal, *pareto.COSTS])
        why = {id(row): text for row, text in zip(shown.off, shown.why, strict=True)}
        for row in rows:
            row |= {"front": id(row) not in why, "why_not": why.get(id(row))}
        choice, asked = self._choose(rows, prefer, tests)
        self.notes += [*notes, *choice.notes, *shown.notes, *tests.notes(), *self._left_out()]
        finalist = next(f for f in self.done if f.method == choice.row["method"])
        return {
            "title": self._title(),
            "metric": self.metric,
            "higher_is_better": self.up,
            "decision": [*self._decision(choice, asked, finalist, tests, rows), *self._unfinished()],
            "choice": {
                **{key: choice.row[key] for key in ("method", "lr", "trial", "directory")},
                **{"seed": finalist.chosen.seed, "sentence": choice.sentence, "prefer": asked},
            },
            "rows": rows,
        }

    def undecided(self, name: str, up: bool) -> dict[str, Any]:
        """Nothing but baselines has been measured on test rows; `name` is the validation score."""
        rows = leaders(self.trials, name, up)
        said = ["Nothing is decided: no tuned method was measured on test rows."]
        if rows:
            first = rows[0]
            said.append(
                f"{first['method']} leads on validation rows so far: {name.removeprefix('valid/')} "
                f"{written(first[name])} after {first['steps']:,} steps{_at(first['lr'])}."
            )
        plain = self._measured_rows(self.done)
        if plain and pareto.known(plain[0], self.goal) is not None:
            value = written(plain[0][self.metric])
            said.append(f"On test rows the best baseline is {plain[0]['method']}: {self.metric} {value}.")
        nothing = {"front": False, "why_not": None, "vs_best": None, "vs_lora": None, "command": None}
        return {
            "title": self._title(),
            "metric": name,
            "higher_is_better": up,
            "decision": [*said, *self._unfinished()],
            "choice": None,
            "rows": [{**row, **nothing} for row in (*rows, *plain)],
        }

    def ledger(self) -> dict[str, Any]:
        """What was tried and what it took."""
        seconds, memory = used(self.trials)
        tried = tuning(self.trials)
        same = ("id", "method", "seed", "rung", "steps", "status", "reason", "curve")
        measured = ("score", "peak_memory_mb")
        return {
            "trials": [
                {key: getattr(t, key) for key in same}
                | {"lr": t.rate, "seconds": t.cost}
                | {key: number(t.metrics.get(key)) for key in measured}
                for t in tried
            ],
            "failed": failures(self.trials),
            "settings": settings(self.trials, {f.method: f.chosen.rate for f in self.done}),
            "spent": {
                "total": self.store.get("spent"),
                "budget": self.facts.get("budget"),
                "stages": self.store.get("stages", {}),
                "methods": seconds,
            },
            "memory": memory,
            "notes": list(dict.fromkeys(self.notes)),
            "command": self.facts.get("command"),
            "environment": self.facts.get("environment"),
        }

    def _measured_rows(self, done: Sequence[Finalist]) -> list[Row]:
        """Best first; of equal ones the cheaper, as `choose` decides."""
        rows = [{**f.row(self.metric), "command": command(self.facts, f)} for f in done]
        order = [self.goal, *pareto.COSTS]

        def loss(row: Row, k: pareto.Objective) -> float:
            value = pareto.known(row, k)
            if value is None:
                return float("inf")
            return -value if k.higher_is_better else value

        return sorted(rows, key=lambda row: [loss(row, k) for k in order])

    def _choose(self, rows: Sequence[Row], prefer: str | None, tests: PairedTests) -> tuple[Choice, str]:
        asked = parse_prefer(prefer or self.facts.get("prefer") or "quality")
        try:
            return choose(rows, asked, self.metric, self.up, tests.same), asked.text
        except UserError as error:
            # A study that ran for hours still has its results when its preference cannot be followed.
            if prefer is not None:
                raise
            self.notes.append(f'The choice is by quality, not by "{asked.text}": {error}')
        return choose(rows, "quality", self.metric, self.up, tests.same), "quality"

    def _decision(
        self, choice: Choice, asked: str, finalist: Finalist, tests: PairedTests, rows: Sequence[Row]
    ) -> Iterator[str]:
        method = finalist.method
        take = f"Take {method}{_at(finalist.chosen.rate)}."
        if finalist.kind == "baseline":
            take = f"Do not fine-tune with this data: take {method}."
        plain = [f.method for f in self.done if f.kind == "baseline" or PROBE.fullmatch(f.method)]
        if tests.best is None:
            yield f"{take} {choice.sentence}"
            yield from self._overlapping(rows, plain)
            return
        said = verdict(tests.best, self.metric, plain)
        # The first sentence of the verdict says the same as that of the choice, with the interval.
        same = asked == "quality" and method == tests.best.against
        yield f"{take} {said.pop(0) if same else choice.sentence}"
        yield from said
        yield from tests.cheaper(rows)

    def _overlapping(self, rows: Sequence[Row], plain: Sequence[str]) -> Iterator[str]:
        """Without paired tests the interval of the best must do."""
        best = rows[0]
        near = [r for r in rows[1:] if r["method"] in plain and pareto.as_good(r, best, self.goal)]
        if near and best["method"] not in plain:
            yield (
                f"{near[0]['method']} ({written(near[0][self.metric])}) lies within the interval of "
                f"{best['method']}: fine-tuning may not be worth it with this data."
            )

    def _unfinished(self) -> Iterator[str]:
        left = [t for t in self.trials if t.status in ("waiting", "running")]
        open_ended = [t for t in left if t.rung != MEASURE]
        unread = [t for t in left if t.rung == MEASURE]
        if open_ended:
            yield f"Not finished: {_counted(open_ended)}."
        if unread and not open_ended:
            yield f"No time was left to read the test rows with {_counted(unread)}."

    def _left_out(self) -> Iterator[str]:
        measured = {f.method for f in self.done}
        tuned = dict.fromkeys(t.method for t in tuning(self.trials) if t.status == "done")
        names = [name for name in tuned if name not in measured]
        if names:
            yield f"Tuned but not measured on test rows: {', '.join(names)}."

    def _title(self) -> str:
        known = [str(self.facts[key]) for key in ("model", "data") if self.facts.get(key)]
        subject = self.facts.get("title") or " on ".join(known)
        count = f"{len({t.method for t in self.trials})} methods compared"
        return f"{subject}: {count}" if subject else count


def _at(rate: float | None) -> str:
    return "" if rate is None else f" at learning rate {rate:g}"


def _counted(trials: Sequence[Trial]) -> str:
    names = ", ".join(dict.fromkeys(t.method for t in trials))
    return f"{len(trials)} trial{'s' if len(trials) > 1 else ''} ({names})"
