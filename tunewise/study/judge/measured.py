"""The trials of a study, grouped by method: finalists over their seeds, settings tried, time and memory used."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunewise.study.judge.row_scores import METRICS
from tunewise.study.schedule import MEASURE
from tunewise.study.tables import Trial

__all__ = [
    "Finalist",
    "command",
    "failures",
    "finalists",
    "leaders",
    "number",
    "settings",
    "tuning",
    "used",
    "validation_metric",
]

# What a trial tells about its run, not about its quality on test rows or its cost.
ABOUT_THE_RUN = ("valid", "micro_batch", "warmup_steps", "decay_from")


@dataclass(frozen=True)
class Finalist:
    """A method at its tuned rate, measured on test rows: `trials` by seed, `chosen` the one that is handed out.

    chosen  the seed with the best validation score, so that test rows do not choose among seeds
    """

    trials: tuple[Trial, ...]
    chosen: Trial

    @property
    def method(self) -> str:
        """The recipe's text, or the baseline's name."""
        return self.chosen.method

    @property
    def kind(self) -> str:
        """ "tuned" or "baseline"."""
        return str(self.chosen.metrics.get("kind", "tuned"))

    def mean(self, key: str) -> float | None:
        """Over the seeds that have a finite value; None without any. Equal whole numbers stay whole."""
        values = [v for t in self.trials if (v := number(t.metrics.get(key))) is not None]
        if not values:
            return None
        return values[0] if len(set(values)) == 1 else math.fsum(values) / len(values)

    def row(self, metric: str) -> dict[str, Any]:
        """Flat: what was measured, as means over seeds; ends of the metric's interval are those of the runs."""
        keys = dict.fromkeys(key for t in self.trials for key in t.metrics)
        wanted = [k for k in keys if "/" not in k and k not in ABOUT_THE_RUN]
        means = {k: v for k in wanted if (v := self.mean(k)) is not None}
        first = {"method": self.method, "kind": self.kind, "lr": self.chosen.rate, "seeds": len(self.trials)}
        order = ("steps", "epochs", metric, f"{metric}_low", f"{metric}_high")
        ordered = {k: means[k] for k in order if k in means}
        last = {"directory": self.chosen.directory, "trial": self.chosen.id}
        return {**first, **ordered, **{k: v for k, v in means.items() if k not in ordered}, **last}


def number(value: Any) -> float | None:
    """The value if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


def tuning(trials: Iterable[Trial]) -> list[Trial]:
    """The trials that look at training and validation rows alone."""
    return [t for t in trials if t.rung < MEASURE]


def validation_metric(trials: Sequence[Trial], metric: str, higher_is_better: bool) -> tuple[str, bool]:
    """(name, higher is better) of what "score" holds: the metric on validation rows, where it is measured there.

    Scores of generated text are not: while tuning the loss stands in for them.
    """
    names = {name for t in trials if number(t.metrics.get("score")) is not None for name in t.metrics}
    if f"valid/{metric}" not in names and "valid/loss" in names:
        return "valid/loss", False
    return f"valid/{metric}", higher_is_better


def finalists(trials: Sequence[Trial], score_up: bool) -> tuple[list[Finalist], list[str]]:
    """Methods that have measured trials, in the order of these, and sentences on what was left out.

    score_up  whether a higher validation score is better. Of a method measured at several rates the rate with
              the most seeds counts, then the one with the best validation score.
    """
    groups: dict[str, dict[float | None, list[Trial]]] = {}
    for trial in trials:
        if trial.rung == MEASURE and trial.status == "done":
            groups.setdefault(trial.method, {}).setdefault(trial.rate, []).append(trial)
    found, notes = [], []
    for method, by_rate in groups.items():
        made = [_finalist(group, trials, score_up) for group in by_rate.values()]
        made.sort(key=lambda f: (-len(f.trials), -_goodness(f.chosen, trials, score_up)))
        found.append(made[0])
        if made[1:]:
            others = ", ".join(f"{f.chosen.rate:g}" for f in made[1:] if f.chosen.rate is not None)
            notes.append(f"{method} was measured at further learning rates, which are left out: {others}.")
    return found, notes


def _finalist(group: Sequence[Trial], trials: Sequence[Trial], score_up: bool) -> Finalist:
    by_seed = {t.seed: t for t in sorted(group, key=lambda t: (t.seed, t.id))}
    seeds = tuple(by_seed.values())
    return Finalist(seeds, max(seeds, key=lambda t: _goodness(t, trials, score_up)))


def _goodness(measured: Trial, trials: Sequence[Trial], score_up: bool) -> float:
    """The validation score of the training of a measured trial; higher is better."""
    key = (measured.method, measured.rate, measured.seed)
    same = [t for t in tuning(trials) if (t.method, t.rate, t.seed) == key and t.status == "done"]
    last = max(same, key=_progress, default=None)
    score = None if last is None else number(last.metrics.get("score"))
    if score is None:
        return -math.inf
    return score if score_up else -score


def _progress(trial: Trial) -> tuple[int, int]:
    return trial.rung, trial.steps


def leaders(trials: Iterable[Trial], name: str, score_up: bool) -> list[dict[str, Any]]:
    """One row per method that was tuned: its furthest trial, of equally far ones the best by validation score.

    name  of the validation score, the key under which the rows hold it. Best row first.
    """
    best: dict[str, tuple[tuple[int, int], float, Trial]] = {}
    for trial in tuning(trials):
        score = number(trial.metrics.get("score"))
        if trial.status == "done" and score is not None:
            entry = (_progress(trial), score if score_up else -score, trial)
            if trial.method not in best or entry[:2] > best[trial.method][:2]:
                best[trial.method] = entry
    rows = []
    for _, goodness, trial in sorted(best.values(), key=lambda e: -e[1]):
        row = {"method": trial.method, "kind": "tuned", "lr": trial.rate, "seeds": 1, "steps": trial.steps}
        row[name] = goodness if score_up else -goodness
        costs = {k: number(trial.metrics.get(k)) for k in ("peak_memory_mb", "trainable")}
        rows.append({**row, **costs, "directory": trial.directory, "trial": trial.id})
    return rows


def settings(trials: Sequence[Trial], chosen: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """Learning rates tried per method, each with its furthest score; `lr` is the one in `chosen`, if any."""
    tried: dict[str, dict[float, Trial]] = {}
    for trial in sorted(tuning(trials), key=lambda t: -t.seed):
        if trial.rate is None or trial.status != "done":
            continue
        rates = tried.setdefault(trial.method, {})
        if trial.rate not in rates or _progress(trial) >= _progress(rates[trial.rate]):
            rates[trial.rate] = trial
    return [
        {
            "method": method,
            "lr": chosen.get(method),
            "tried": [
                {"lr": rate, "steps": t.steps, "score": number(t.metrics.get("score"))}
                for rate, t in sorted(rates.items())
            ],
        }
        for method, rates in sorted(tried.items())
    ]


def failures(trials: Iterable[Trial]) -> list[dict[str, Any]]:
    """Trials that failed, tuning or measuring, with the reason in words."""
    return [
        {
            "trial": t.id,
            "method": t.method,
            "lr": t.rate,
            "seed": t.seed,
            "steps": t.steps,
            "reason": t.reason,
        }
        for t in trials
        if t.status == "failed"
    ]


def used(trials: Iterable[Trial]) -> tuple[dict[str, float], dict[str, float]]:
    """(seconds, highest peak memory in MiB) per method, over all its trials and attempts."""
    seconds: dict[str, float] = {}
    memory: dict[str, float] = {}
    for trial in trials:
        seconds[trial.method] = seconds.get(trial.method, 0.0) + trial.cost
        peak = number(trial.metrics.get("peak_memory_mb"))
        if peak is not None:
            memory[trial.method] = max(peak, memory.get(trial.method, 0.0))
    return seconds, memory


def command(facts: Mapping[str, Any], finalist: Finalist) -> str | None:
    """`tunewise tune ...` for the chosen seed; None for what a command line cannot name.

    That is a baseline, and a model, data or metric that were objects. `facts["settings"]` are those of the loop,
    `facts["options"]` further options of `tune` that the study was given (label_column, max_length, ...).
    """
    trial, model, data = finalist.chosen, facts.get("model"), facts.get("data")
    known = METRICS.get(str(facts.get("task")), ())
    unnamed = not model or not data or facts.get("metric") not in known or facts.get("custom_metric")
    if finalist.kind == "baseline" or unnamed:
        return None
    own = {key: number(trial.metrics.get(key)) for key in ("micro_batch", "warmup_steps", "decay_from")}
    loop = {**(facts.get("settings") or {}), **{k: round(v) for k, v in own.items() if v is not None}}
    steps = round(number(trial.metrics.get("steps")) or trial.steps)
    options: dict[str, Any] = {"method": trial.method, "lr": trial.rate, "seed": trial.seed}
    options |= {"steps": steps or None, "batch_size": facts.get("batch_size")}
    options["dtype"] = loop.get("dtype")
    options |= facts.get("options") or {}
    if facts["metric"] != known[0]:
        options["metric"] = facts["metric"]
    words = ["tunewise", "tune", str(model), str(data)]
    for key, value in options.items():
        flag = f"--{key.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is not None and value is not False:
            words += [flag, ",".join(value) if isinstance(value, (list, tuple)) else f"{value}"]
    for key, value in loop.items():
        if value is not None and key not in (*options, "epochs"):
            words += ["--set", f"{key}={value}"]
    return shlex.join(words)
