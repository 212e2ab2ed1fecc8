"""The page of a comparison: the decision, what it rests on, what it cost, what failed, and how to do it again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tunewise.study.judge.pareto import COSTS
from tunewise.study.report.cells import (
    COST,
    duration,
    finite,
    interval,
    megabytes,
    number_cell,
    score,
    text_cell,
)
from tunewise.study.report.charts import Look, looks, swatch
from tunewise.study.report.page import render, script, write_page
from tunewise.study.report.study_charts import Drawn, chart_data, curves, tradeoff

__all__ = ["write_study_report"]

Row = Mapping[str, Any]
COLUMNS = {
    **COST,
    "inference_seconds": ("inference, 1,000 rows", lambda v: f"{v:.3g} s"),
    "forgetting": ("forgetting, nats", lambda v: f"{v:.3f}"),
    "forgetting_kl": ("forgetting, KL", lambda v: f"{v:.3f}"),
}
BESIDE = {"macro_f1": "macro-F1", "balanced_accuracy": "balanced accuracy"}
AGAINST = {"vs_best": "against the best", "vs_lora": "against LoRA"}
SETTINGS = {"seeds": "seeds", "steps": "steps", "epochs": "epochs"}


def write_study_report(path: str | Path, findings: dict[str, Any]) -> Path:
    """One self-contained HTML page of what a comparison found; whatever is missing is left out and said.

    findings  a JSON-ready dict with `metric`, `higher_is_better`, `decision` (sentences), `choice`, `rows` (one
              per method and baseline), `trials`, `failed`, `settings`, `spent`, `memory`, `notes`, `command`,
              `environment`; every one but the first may be missing or empty
    Raises `UserError` if the file cannot be written.
    """
    metric, higher = str(findings["metric"]), bool(findings.get("higher_is_better", True))
    rows, trials = list(findings.get("rows") or ()), list(findings.get("trials") or ())
    drawn = _looks(rows, trials)
    made = [tradeoff(rows, cost, metric, higher, drawn) for cost in COSTS]
    tradeoffs = [chart for chart in made if chart is not None]
    # Before anything was measured no rate is chosen; then that of the method's leading trial stands in the table.
    settings = list(findings.get("settings") or ())
    rates = {r["method"]: r.get("lr") for r in (*rows, *(s for s in settings if finite(s.get("lr"))))}
    learning = _learning(trials, metric, rates, drawn)
    charts = [*tradeoffs, *learning]
    scripts = [script("sort.js"), script("study_report.js")]
    if charts:
        scripts.insert(0, _viewer())
    page = render(
        "study_report.html.jinja",
        scripts,
        title=findings.get("title") or "Comparison",
        decision=list(findings.get("decision") or ["Nothing has been measured."]),
        fronted=any(r.get("front") for r in rows),
        baselines=any(r.get("kind") == "baseline" for r in rows),
        choice=_choice(findings, rows, metric),
        tradeoffs=tradeoffs,
        learning=learning,
        better="Up" if higher else "Down",
        data=chart_data(charts),
        legend=[{"name": name, "swatch": swatch(look)} for name, look in drawn.items()],
        **_table(rows, findings.get("choice") or {}, metric),
        beaten=[r for r in rows if r.get("why_not")],
        settings=[_tried(s) for s in settings],
        where=_where(findings),
        failed=list(findings.get("failed") or ()),
        trials=_trials(trials),
        notes=list(findings.get("notes") or ()),
        command=findings.get("command"),
        commands=[r for r in rows if r.get("command")],
        environment=sorted((findings.get("environment") or {}).items()),
    )
    return write_page(Path(path), page)


@cache
def _viewer() -> str:
    """Vega, Vega-Lite and vega-embed as one script, which needs no network and no `eval`."""
    import vl_convert

    text: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return text


def _looks(rows: Sequence[Row], trials: Sequence[Row]) -> dict[str, Look]:
    """One look for every name in all charts: methods in the order of the table, then those only tried."""
    baselines = [str(r["method"]) for r in rows if r.get("kind") == "baseline"]
    names = [str(r["method"]) for r in (*rows, *trials) if str(r["method"]) not in baselines]
    return looks(list(dict.fromkeys(names)), baselines)


def _learning(
    trials: Sequence[Row], metric: str, chosen: Mapping[str, Any], drawn: Mapping[str, Look]
) -> list[Drawn]:
    plain = metric.removeprefix("valid/")
    wanted = ((f"valid/{plain}", f"{plain} on validation rows"), ("loss", "training loss"))
    made = [curves(trials, key, title, chosen, drawn) for key, title in wanted]
    if made[0] is None and plain != "loss":
        # Scores of generated text are measured at the end alone: while tuning the loss stands in for them.
        made[0] = curves(trials, "valid/loss", "loss on validation rows", chosen, drawn)
    return [chart for chart in made if chart is not None]


def _choice(findings: Row, rows: Sequence[Row], metric: str) -> dict[str, Any] | None:
    """What was chosen, with the numbers of its row."""
    choice = findings.get("choice")
    if not choice:
        return None
    row = next((r for r in rows if r["method"] == choice["method"]), {})
    facts = []
    if finite(choice.get("lr")):
        facts.append(("learning rate", f"{choice['lr']:.3g}", ""))
    if finite(row.get(metric)):
        facts.append((metric, score(row[metric]), interval(row, metric)))
    facts += [(title, write(row[key]), "") for key, (title, write) in COLUMNS.items() if finite(row.get(key))]
    said = choice.get("sentence")
    return {**choice, "facts": facts, "sentence": said if said not in findings.get("decision", ()) else None}


def _table(rows: Sequence[Row], choice: Row, metric: str) -> dict[str, Any]:
    def some(keys: Sequence[str]) -> list[str]:
        return [key for key in keys if any(finite(r.get(key)) for r in rows)]

    costs, settings = some(list(COLUMNS)), some(["lr", *SETTINGS])
    # Before a tuned method is measured, rows are ordered by validation rows; baselines may have test rows already.
    plain = metric.removeprefix("valid/")
    beside = [key for key in some(list(dict.fromkeys([plain, *BESIDE]))) if key != metric]
    against = [key for key in AGAINST if any(r.get(key) for r in rows)]
    titles = [metric, *(AGAINST[k] for k in against), *(COLUMNS[k][0] for k in costs)]
    titles += [BESIDE.get(k, f"{k} on test rows") for k in beside]
    titles += ["learning rate" if k == "lr" else SETTINGS[k] for k in settings]
    fronted = any(r.get("front") for r in rows)
    columns = [{"title": "method", "numeric": False}, *[{"title": "front", "numeric": True}] * fronted]
    columns += [{"title": title, "numeric": True} for title in titles]
    shown = []
    for row in rows:
        cells = [text_cell(row["method"])]
        cells += [number_cell(int(bool(row.get("front"))), lambda v: "yes" * int(v))] * fronted
        cells += [number_cell(row.get(metric), score, interval(row, metric))]
        cells += [_against(row.get(k)) for k in against]
        cells += [number_cell(row.get(k), COLUMNS[k][1]) for k in costs]
        cells += [number_cell(row.get(k), score, interval(row, k)) for k in beside]
        cells += [number_cell(row.get(k), _setting) for k in settings]
        marks = {"best": row["method"] == choice.get("method"), "baseline": row.get("kind") == "baseline"}
        marks["front"] = bool(row.get("front"))
        shown.append({"cells": cells, "class": " ".join(name for name, on in marks.items() if on)})
    return {"columns": columns, "rows": shown}


def _setting(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:.3g}"


def _against(difference: Row | None) -> dict[str, Any]:
    """ "worse", beside it the difference, its interval and p."""
    if not difference or not finite(difference.get("difference")):
        return number_cell(None, score)
    value, p = difference["difference"], difference.get("p")
    said = f"{value:+.3f}"
    if finite(difference.get("low")) and finite(difference.get("high")):
        said += f" ({difference['low']:+.3f} to {difference['high']:+.3f})"
    if p is not None and finite(p):
        said += f", p {'< 0.001' if p < 0.001 else f'{p:.2g}'}"
    return number_cell(value, lambda _: str(difference.get("verdict") or ""), said)


def _tried(setting: Row) -> dict[str, Any]:
    """A method's learning rates with their scores, and a small picture of them: is the best one inside?"""
    tried = sorted(
        (t for t in setting.get("tried") or () if finite(t.get("lr"))), key=lambda t: (t["lr"], t["steps"])
    )
    chosen = setting.get("lr")
    lines = [
        {
            "lr": f"{t['lr']:.3g}",
            "steps": f"{t['steps']:,}",
            "score": score(t["score"]) if finite(t.get("score")) else "failed",
            "chosen": t["lr"] == chosen,
        }
        for t in tried
    ]
    rate = f"{chosen:.3g}" if finite(chosen) else None
    return {"method": setting["method"], "lr": rate, "tried": lines, "dots": _dots(tried, chosen)}


def _dots(tried: Sequence[Row], chosen: Any) -> list[dict[str, Any]]:
    """Places in a box of 100 by 100: the logarithm of the rate, the score, a larger dot for more steps."""
    known = [t for t in tried if finite(t.get("score")) and t["lr"] > 0]
    if len({t["lr"] for t in known}) < 2:
        return []
    x, y = [math.log(t["lr"]) for t in known], [float(t["score"]) for t in known]
    most = max(t["steps"] for t in known)

    def place(value: float, values: Sequence[float]) -> float:
        width = max(values) - min(values)
        return round(100 * (value - min(values)) / width, 1) if width else 50.0

    return [
        {
            "x": place(a, x),
            "y": 100 - place(b, y),
            "r": 3 + 3 * t["steps"] / most,
            "chosen": t["lr"] == chosen,
        }
        for t, a, b in zip(known, x, y, strict=True)
    ]


def _where(findings: Row) -> list[dict[str, Any]]:
    """Where time and memory went: bars, each of named parts that are shares of the longest bar."""
    spent, found = findings.get("spent") or {}, []
    stages = {k: v for k, v in (spent.get("stages") or {}).items() if finite(v) and v > 0}
    if finite(spent.get("total")):
        total, budget = float(spent["total"]), float(spent.get("budget") or 0)
        rest = total - sum(stages.values())
        stages |= {"everything else": rest} if rest > 0.01 * total else {}
        stages |= {"not used": budget - total} if budget > total else {}
        said = f"{duration(total)} of {duration(budget)}" if budget else duration(total)
        found.append(_bars("Time by stage", {said: stages}, duration))
    tuning: dict[str, float] = {}
    for trial in findings.get("trials") or ():
        if finite(trial.get("seconds")):
            tuning[trial["method"]] = tuning.get(trial["method"], 0.0) + trial["seconds"]
    methods: dict[str, dict[str, float]] = {}
    for name, seconds in (spent.get("methods") or {}).items():
        if finite(seconds):
            searched = min(tuning.get(name, 0.0), seconds)
            methods[name] = {"tuning": searched, "measuring": seconds - searched}
    found.append(_bars("Time by method", methods, duration))
    memory = {n: {"peak memory": mb} for n, mb in (findings.get("memory") or {}).items() if finite(mb)}
    found.append(_bars("Peak memory by method", memory, megabytes))
    return [bars for bars in found if bars["bars"]]


def _bars(title: str, bars: Mapping[str, Mapping[str, float]], write: Any) -> dict[str, Any]:
    sums = {name: sum(parts.values()) for name, parts in bars.items()}
    longest = max(sums.values(), default=0.0) or 1.0
    names = list(dict.fromkeys(name for parts in bars.values() for name in parts))
    shown = [
        {
            "name": name,
            "total": write(sums[name]),
            "parts": [
                {
                    "name": part,
                    "text": write(v),
                    "share": f"{100 * v / longest:.2f}",
                    "kind": names.index(part),
                }
                for part, v in bars[name].items()
                if v > 0
            ],
        }
        for name in sorted(bars, key=lambda n: -sums[n])
    ]
    return {"title": title, "bars": shown, "names": names, "single": len(shown) == 1}


def _trials(trials: Sequence[Row]) -> dict[str, Any]:
    """Every tuning trial as one row of a table."""
    titles = ("learning rate", "seed", "round", "steps", "score", "time", "peak memory")
    columns = [{"title": "method", "numeric": False}, {"title": "status", "numeric": False}]
    columns += [{"title": title, "numeric": True} for title in titles]
    shown = []
    for trial in trials:
        cells = [text_cell(trial["method"]), text_cell(trial.get("status") or "")]
        cells += [number_cell(trial.get(key), _setting) for key in ("lr", "seed", "rung", "steps")]
        cells.append(number_cell(trial.get("score"), score))
        cells.append(number_cell(trial.get("seconds"), duration))
        cells.append(number_cell(trial.get("peak_memory_mb"), megabytes))
        shown.append({"cells": cells, "class": ""})
    return {"columns": columns, "rows": shown}
