"""One self-contained HTML page about one run or many: it opens offline, on a phone, in the dark, and on paper."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunewise.core.errors import UserError
from tunewise.study.cells import COST, score, verdict

__all__ = ["run_report", "write_report"]

Row = Mapping[str, Any]
LOSS_POINTS = 40
OWN_KEYS = ("metrics", "command", "notes")


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
           `trainable`, `memory_mb`, `seconds`, `size_bytes`; missing ones are left blank
    runs   one dict per run: `name`, `metrics` (the lines of metrics.jsonl), `settings` (a dict, shown as it is)
    notes  sentences that the reader should know
    """
    from jinja2 import Environment, PackageLoader

    from tunewise import __version__

    environment = Environment(
        loader=PackageLoader("tunewise.study", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html.jinja").render(
        title=title,
        verdict=verdict(rows, metric, higher_is_better),
        **_table(rows, metric, higher_is_better),
        charts=_charts(rows, runs, metric),
        notes=list(notes),
        command=command,
        settings=[{"title": r["name"], "pairs": _flat(r["settings"])} for r in runs if r.get("settings")],
        version=__version__,
    )
    return _write(Path(path), page)


def run_report(run_dir: str | Path, path: str | Path | None = None) -> Path:
    """The page about one run, from its `run.json` and `metrics.jsonl`; written as `report.html` beside them."""
    folder = Path(run_dir)
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        metrics = [json.loads(line) for line in lines if line.strip()]
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}.") from None
    except json.JSONDecodeError as error:
        raise UserError(f"A file of the run {folder} is not valid JSON: {error}.") from None
    final: dict[str, Any] = run.get("metrics") or {}
    metric = str(run.get("metric") or next((k for k in final if "/" not in k), "accuracy"))
    cost: dict[str, Any] = run.get("cost") or {}
    name = str((run.get("recipe") or {}).get("name") or run.get("method") or folder.name)
    row = {"method": name, **final, **{key: cost.get(key, run.get(key)) for key in COST}}
    settings = {"result": final, **{k: v for k, v in run.items() if k not in OWN_KEYS}}
    return write_report(
        path or folder / "report.html",
        [row],
        [{"name": name, "metrics": metrics, "settings": settings}],
        run.get("notes") or [],
        title=f"Run {folder.resolve().name}",
        metric=metric,
        higher_is_better=bool(run.get("higher_is_better", True)),
        command=run.get("command"),
    )


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _table(rows: Sequence[Row], metric: str, higher_is_better: bool) -> dict[str, Any]:
    costs = [key for key in COST if any(_finite(row.get(key)) for row in rows)]
    columns = [{"title": "method", "numeric": False}, {"title": metric, "numeric": True}]
    columns += [{"title": COST[key][0], "numeric": True} for key in costs]
    values = [row[metric] for row in rows if _finite(row.get(metric))]
    best = (max if higher_is_better else min)(values, default=None)
    shown = []
    for row in rows:
        cells = [{"text": row["method"], "value": row["method"], "numeric": False}]
        cells.append(_cell(row.get(metric), score, _range(row, metric)))
        cells += [_cell(row.get(key), COST[key][1]) for key in costs]
        is_best = best is not None and len(rows) > 1 and row.get(metric) == best
        shown.append({"cells": cells, "best": is_best})
    return {"columns": columns, "rows": shown}


def _cell(value: Any, write: Any, interval: str = "") -> dict[str, Any]:
    if not _finite(value):
        return {"text": "", "value": "", "numeric": True}
    return {"text": write(value), "value": repr(value), "numeric": True, "range": interval}


def _range(row: Row, metric: str) -> str:
    low, high = row.get(f"{metric}_low"), row.get(f"{metric}_high")
    return f"{score(low)} to {score(high)}" if _finite(low) and _finite(high) else ""


def _charts(rows: Sequence[Row], runs: Sequence[Row], metric: str) -> list[dict[str, str]]:
    from tunewise.study.charts import cost_chart, curve_chart

    charts = []
    names = [str(run["name"]) for run in runs]
    for key, title, most in ((f"valid/{metric}", "On validation rows", 300), ("loss", "Training", LOSS_POINTS)):
        points = [
            {"name": str(run["name"]), "step": line["step"], "value": line[key]}
            for run in runs
            for line in run.get("metrics") or ()
            if _finite(line.get(key)) and _finite(line.get("step"))
        ]
        if len(points) > len({p["name"] for p in points}):
            shown = [n for n in names if any(p["name"] == n for p in points)]
            text = f"{metric} while it learns" if key != "loss" else "loss while it learns, means of a few steps"
            svg = curve_chart(points, metric if key != "loss" else "training loss", shown, most)
            charts.append({"title": title, "caption": text, "svg": svg})
    for key, words in (("trainable", "trainable parameters"), ("seconds", "seconds")):
        dots = [
            {"name": str(r["method"]), "x": r[key], "y": r[metric],
             "low": r.get(f"{metric}_low"), "high": r.get(f"{metric}_high")}
            for r in rows
            if _finite(r.get(key)) and r[key] > 0 and _finite(r.get(metric))
        ]  # fmt: skip
        if len(dots) > 2:
            svg = cost_chart(dots, words, metric, [str(r["method"]) for r in rows])
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


def _write(path: Path, page: str) -> Path:
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(page, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise UserError(f"The report {path} cannot be written: {error.strerror}.") from None
    return path
