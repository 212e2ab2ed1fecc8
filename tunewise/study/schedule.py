"""Which trials a study runs: a plan of successive halving or a fixed list, in the terms of the store."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tunewise.core.errors import UserError, did_you_mean
from tunewise.study.replay import Finished, Outcome, Standing, Trial, key_of
from tunewise.study.store import Store

__all__ = ["MEASURE", "Fixed", "Schedule", "finished_rows", "folder_of", "fixed_list"]

MEASURE = 100
"""The rung of the rows that hold what was measured on test rows."""


class Schedule(Protocol):
    """`next_trials` and `outcome` are functions of the finished rows alone; `last` is the rung of finalists."""

    @property
    def last(self) -> int: ...
    def next_trials(self, finished: Iterable[Finished]) -> list[Trial]: ...
    def outcome(self, finished: Iterable[Finished]) -> Outcome: ...
    def describe(self) -> str: ...


@dataclass(frozen=True)
class Fixed:
    """Every trial of a list once, each from its start to its end; of each method the best rate is a finalist."""

    trials: Sequence[Trial]
    last: int = 0

    def next_trials(self, finished: Iterable[Finished]) -> list[Trial]:
        """Those without a row, in their order."""
        known = {row.key for row in finished}
        return [trial for trial in self.trials if trial.key not in known]

    def outcome(self, finished: Iterable[Finished]) -> Outcome:
        """Of each method the rate with the best mean score over its seeds; most seeds first where they differ."""
        rows = {row.key: row for row in finished}
        groups: dict[str, dict[float | None, list[Trial]]] = defaultdict(lambda: defaultdict(list))
        failed: dict[str, list[str]] = defaultdict(list)
        for trial in self.trials:
            row = rows.get(trial.key)
            if row is not None and row.failed:
                failed[trial.method].append(str(row.reason or "no finite score"))
            elif row is not None:
                groups[trial.method][trial.lr].append(trial)
        standings = []
        for method, by_rate in groups.items():
            scores = {
                lr: {t.seed: float(rows[t.key].score or 0.0) for t in trials}
                for lr, trials in by_rate.items()
            }
            lr = max(scores, key=lambda r: (len(scores[r]), sum(scores[r].values()) / len(scores[r])))
            keys = {t.seed: t.key for t in by_rate[lr]}
            standings.append(Standing(method, lr, by_rate[lr][0].steps, True, scores[lr], keys))
        standings.sort(key=lambda s: (-s.mean, s.method))
        lost = {m: reasons for m, reasons in failed.items() if m not in groups}
        spent = sum(row.seconds for row in rows.values())
        return Outcome(standings, lost, [], spent, not self.next_trials(rows.values()))

    def describe(self) -> str:
        """How many trials of which methods."""
        names = list(dict.fromkeys(trial.method for trial in self.trials))
        return f"{len(self.trials)} given trials of {len(names)} methods: {', '.join(names)}."


def fixed_list(given: Sequence[Any]) -> Fixed:
    """From dicts {"method", "lr", "seed", "steps"}; a missing seed is 0. Raises `UserError` for what is not clear."""
    names, trials = ("method", "lr", "seed", "steps"), []
    for place, item in enumerate(given, start=1):
        if not isinstance(item, Mapping) or "method" not in item:
            raise UserError(f'Trial {place} is no dict with "method" and "steps".')
        for key in item:
            if key not in names:
                raise UserError(f'Trial {place} has an unknown key "{key}"{did_you_mean(key, names)}')
        method, lr, seed = item["method"], item.get("lr"), int(item.get("seed", 0))
        steps = int(item.get("steps", 0))
        if steps < 0 or (lr is not None and (steps < 1 or not lr > 0)):
            raise UserError(
                f"Trial {place} ({method}) needs lr > 0 and steps >= 1, not lr={lr}, steps={steps}."
            )
        trials.append(Trial(key_of(method, lr, seed, 0), method, lr, seed, 0, 0, steps))
    keys = [trial.key for trial in trials]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if not trials or twice:
        raise UserError(f"The trial {twice} is given twice." if twice else "The list of trials is empty.")
    return Fixed(trials)


def finished_rows(store: Store, higher_is_better: bool = True) -> list[Finished]:
    """The tuning trials of a store that are done or failed; scores such that higher is better."""
    found = []
    for t in store.trials():
        if t.rung == MEASURE or t.status not in ("done", "failed"):
            continue
        score = t.metrics.get("score")
        if score is not None:
            score = float(score) if higher_is_better else -float(score)
            score = score if math.isfinite(score) else None
        key = key_of(t.method, t.rate, t.seed, t.rung)
        reason = t.reason if t.status == "failed" else None
        found.append(Finished(key, score, t.cost, float(t.metrics.get("training", 0.0)), reason))
    return found


def folder_of(place: int, method: str, lr: float | None, seed: int) -> str:
    """The folder of a configuration in its study, shared by its trials: each goes on from the one before."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", method).strip("-")[:40].strip("-") or "method"
    rate = "" if lr is None else f"lr{lr:g}-"
    return f"trials/{place:02d}-{name}/{rate}seed{seed}"
