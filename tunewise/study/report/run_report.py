"""One self-contained HTML page about one run or many: offline, on a phone, in the dark, on paper."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunewise.core.errors import UserError
from tunewise.study.report.cells import COST, finite, headline, interval, number_cell, score, text_cell
from tunewise.study.report.charts import cost_chart, curve_chart, looks, swatch
from tunewise.study.report.page import render, script, write_page
from tunewise.study.report.routing_charts import routing_charts

__all__ = ["run_report", "write_report"]

Row = Mapping[str, Any]
CURVE_POINTS, LOSS_POINTS = 300, 40
OPTIONS = ("lr", "batch_size", "epochs", "steps", "dtype", "checkpoint_every")


def write_report(
    path: str | Path,
    rows: Sequence[Row],
    runs: Sequence[Row] = (),
    notes: Sequence[str] = (),
    *,
    title: str = "Tunewise report",
    metric: str = "accuracy",
    higher_is_better: bool = True,
    command: str | None = None,
) -> Path:
    """Verdict, table, learning curves, quality over cost, settings, and the command that does it again.

    rows   one dict per method: `method`, the metric (with `<metric>_low` and `_high` if known), and any of
           `trainable`, `peak_memory_mb`, `seconds`, `size_mb`; missing ones are left blank
    runs   one dict per run: `name`, `metrics` (the lines of metrics.jsonl), `settings` (a dict)
    notes  sentences that the reader should know
    """
    # One order for all charts, so that a method has the same colour everywhere.
    names = list(
        dict.fromkeys(
            [str(r["method"]) for r in rows if r.get("trainable") != 0] + [str(r["name"]) for r in runs]
        )
    )
    page = render(
        "report.html.jinja",
        [script("sort.js")],
        title=title,
        verdict=headline(rows, metric, higher_is_better),
        **_table(rows, metric, higher_is_better),
        charts=_charts(rows, runs, metric, names),
        legend=[{"name": name, "swatch": swatch(look)} for name, look in looks(names).items()]
        if len(names) > 1
        else [],
        notes=list(notes),
        command=command,
        settings=[{"title": r["name"], "pairs": _flat(r["settings"])} for r in runs if r.get("settings")],
    )
    return write_page(Path(path), page)


def run_report(run_dir: str | Path, path: str | Path | None = None) -> Path:
    """The page about one run, from its `run.json` and `metrics.jsonl`; `report.html` beside them."""
    folder = Path(run_dir)
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        metrics = [json.loads(line) for line in lines if line.strip()]
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}.") from None
    except json.JSONDecodeError as error:
        raise UserError(f"A file of the run {folder} is not valid JSON: {error}.") from None
    identity: dict[str, Any] = run.get("identity") or {}
    final: dict[str, Any] = run.get("metrics") or {}
    metric = _main_metric(identity, final)
    name = str(run.get("recipe_name") or folder.name)
    shown = {"result": final, **{k: v for k, v in identity.items() if k != "method"}}
    shown |= {key: run[key] for key in ("environment",) if key in run}
    return write_report(
        path or folder / "report.html",
        [{"method": name, **final}],
        [{"name": name, "metrics": metrics, "settings": shown}],
        (run.get("data") or {}).get("notes") or [],
        title=f"Run {folder.resolve().name}",
        metric=metric,
        command=_command(run, identity, name),
    )


def _main_metric(identity: Row, final: Row) -> str:
    """The metric that the run was judged by: on test rows, else on validation rows."""
    named = (identity.get("task") or {}).get("metric")
    metric = str(named or next((k for k in final if k not in COST and k != "steps"), "accuracy"))
    return f"valid/{metric}" if metric not in final and f"valid/{metric}" in final else metric


def _command(run: Row, identity: Row, method: str) -> str | None:
    """The command line of this run; None when model or data were objects, which no command line can name."""
    import shlex

    model, data = (identity.get("model") or {}).get("name"), (run.get("data") or {}).get("name")
    if not model or not data:
        return None
    words = [
        "tunewise",
        "tune",
        str(model),
        str(data),
        "--method",
        method,
        "--seed",
        str(identity.get("seed", 0)),
    ]
    settings: Row = identity.get("settings") or {}
    for key, value in settings.items():
        if value is not None and key in OPTIONS:
            words += [f"--{key.replace('_', '-')}", str(value)]
        elif value is not None:
            words += ["--set", f"{key}={value}"]
    return shlex.join(words)


def _table(rows: Sequence[Row], metric: str, higher_is_better: bool) -> dict[str, Any]:
    costs = [key for key in COST if any(finite(row.get(key)) for row in rows)]
    columns = [{"title": "method", "numeric": False}, {"title": metric, "numeric": True}]
    columns += [{"title": COST[key][0], "numeric": True} for key in costs]
    values = [row[metric] for row in rows if finite(row.get(metric))]
    best = (max if higher_is_better else min)(values, default=None)
    shown = []
    for row in rows:
        cells = [text_cell(row["method"])]
        cells.append(number_cell(row.get(metric), score, interval(row, metric)))
        cells += [number_cell(row.get(key), COST[key][1]) for key in costs]
        is_best = best is not None and len(rows) > 1 and row.get(metric) == best
        shown.append({"cells": cells, "class": "best" if is_best else ""})
    return {"columns": columns, "rows": shown}


def _charts(rows: Sequence[Row], runs: Sequence[Row], metric: str, names: list[str]) -> list[dict[str, str]]:
    charts = []
    looked_at = metric.removeprefix("valid/")
    curves = (
        (f"valid/{looked_at}", "On validation rows", looked_at, "while it learns", CURVE_POINTS),
        ("loss", "Training", "training loss", "means of a few steps", LOSS_POINTS),
    )
    for key, title, axis, caption, most in curves:
        points = [
            {"name": str(run["name"]), "step": line["step"], "value": line[key]}
            for run in runs
            for line in run.get("metrics") or ()
            if finite(line.get(key)) and finite(line.get("step"))
        ]
        if len(points) > len({p["name"] for p in points}):
            svg = curve_chart(points, axis, names, most)
            charts.append({"title": title, "caption": f"{axis}, {caption}", "svg": svg})
    charts += routing_charts(runs, names)
    for key, words in (("trainable", "trainable parameters"), ("seconds", "seconds")):
        dots = [
            {
                "name": str(r["method"]),
                "x": r[key],
                "y": r[metric],
                "low": r.get(f"{metric}_low"),
                "high": r.get(f"{metric}_high"),
            }
            for r in rows
            if str(r["method"]) in names and finite(r.get(key)) and r[key] > 0 and finite(r.get(metric))
        ]
        if len(dots) > 2:
            svg = cost_chart(dots, words, metric, names)
            charts.append({"title": f"Quality and {words}", "caption": "up and left is better", "svg": svg})
    return charts


def _flat(values: Row, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as `a.b.c` and one line each, in their order."""
    found: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found += _flat(value, f"{prefix}{key}.")
        elif isinstance(value, float):
            found.append((f"{prefix}{key}", f"{value:.6g}"))
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            found.append((f"{prefix}{key}", text))
    return found
