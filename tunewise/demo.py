"""`tunewise demo`: two baselines and four methods on the same real rows, a table, and a report."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunewise.core.errors import UserError

__all__ = ["Demo", "run_demo"]

Say = Callable[[str], None]
METRIC = "accuracy"


@dataclass(frozen=True)
class Plan:
    """One demo: a model, a data set, and settings per method."""

    model: str
    data: str
    command: str
    methods: dict[str, dict[str, Any]]
    common: dict[str, Any] = field(default_factory=dict)


FULL = Plan(
    model="minilm",
    data="reviews",
    command="tunewise demo",
    methods={
        "linear_probe": {},
        "bias_scale": {"lr": 5e-3, "epochs": 2},
        "lora": {"lr": 1e-3, "epochs": 2},
        "full": {"lr": 1e-4, "epochs": 2},
    },
    common={"batch_size": 32, "max_length": 64, "options": {"evaluations": 2}},
)
QUICK = Plan(
    model="tiny-roberta",
    data="peptides",
    command="tunewise demo --quick",
    methods={
        "linear_probe": {},
        "bias_scale": {"lr": 5e-3},
        "lora": {"lr": 2e-3},
        "full": {"lr": 5e-4},
    },
    common={
        "batch_size": 32,
        "max_length": 48,
        "steps": 60,
        "options": {"evaluations": 2, "valid_rows": 100},
    },
)


@dataclass
class Demo:
    """What the demo measured; `rows` are flat, one per baseline or method."""

    directory: Path
    report: Path
    rows: list[dict[str, Any]]

    def summary(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"directory": str(self.directory), "report": str(self.report), "rows": self.rows}

    def table(self) -> Any:
        """A rich table: accuracy with its interval, and what it cost."""
        from rich import box
        from rich.table import Table

        from tunewise.study.report.cells import COST, score

        best = max(self.rows, key=lambda row: row[METRIC])
        made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        made.add_column("method")
        for title in (METRIC, "95 % interval", *(title for title, _ in COST.values())):
            made.add_column(title, justify="right")
        for row in self.rows:
            cells = [COST[key][1](row[key]) if row.get(key) is not None else "" for key in COST]
            interval = f"{score(row[f'{METRIC}_low'])} to {score(row[f'{METRIC}_high'])}"
            style = "bold" if row is best else None
            made.add_row(row["method"], score(row[METRIC]), interval, *cells, style=style)
        return made


def run_demo(
    out: str | Path = "demo-run", quick: bool = False, say: Say | None = None, progress: bool = False
) -> Demo:
    """Runs the baselines and every method on the same splits; a finished method is not run again.

    Raises `UserError` where `out` holds something else than an earlier demo.
    """
    from tunewise.study.report.run_report import write_report
    from tunewise.tune import tune

    say = say or (lambda sentence: None)
    plan, folder = QUICK if quick else FULL, Path(out)
    _check_folder(folder, plan)
    say(f"Fine-tuning {plan.model} on {plan.data}: 2 baselines, then {', '.join(plan.methods)}.")
    rows, notes = _baselines(plan, say)
    runs: list[dict[str, Any]] = []
    for place, (name, settings) in enumerate(plan.methods.items(), start=1):
        say(f"[{place}/{len(plan.methods)}] {name}")
        run_dir = folder / name
        result = tune(
            plan.model,
            plan.data,
            method=name,
            out=run_dir,
            resume=(run_dir / "run.json").is_file(),
            seed=0,
            progress=progress,
            **plan.common,
            **settings,
        )
        rows.append({"method": name, **result.metrics})
        runs.append({"name": name, "metrics": _lines(run_dir), "settings": {**plan.common, **settings}})
        say(f"      {METRIC} {result.metrics[METRIC]:.3f} in {result.metrics['seconds']:.0f} s")
    notes += [
        "One seed and one learning rate per method: intervals cover the choice of test rows, not of seeds."
    ]
    report = write_report(
        folder / "report.html",
        rows,
        runs,
        notes,
        title=f"Demo: {plan.model} on {plan.data}",
        metric=METRIC,
        command=plan.command if str(out) == "demo-run" else f"{plan.command} --out {out}",
    )
    return Demo(folder, report, rows)


def _check_folder(folder: Path, plan: Plan) -> None:
    """A folder of another demo or of anything else is refused before minutes are spent."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; give the demo a folder with --out.")
    known = {*plan.methods, "report.html"}
    strange = next((p.name for p in sorted(folder.iterdir()) if p.name not in known), None)
    if strange is not None:
        raise UserError(
            f"{folder} holds {strange}, which is no part of the demo; give another folder with --out."
        )


def _baselines(plan: Plan, say: Say) -> tuple[list[dict[str, Any]], list[str]]:
    """Measured on the same train and test rows as the methods."""
    from tunewise.data import detect_columns, read_rows, split_rows, usable_rows
    from tunewise.study.baselines.measured import measure_baseline
    from tunewise.task import make_task

    rows = read_rows(plan.data)
    columns = detect_columns(rows)
    splits = split_rows(usable_rows(rows, columns), columns)
    notes = list(dict.fromkeys([*rows.notes, *columns.notes, *splits.notes]))
    for note in notes:
        say(note)
    task = make_task(columns.task, columns)
    task.fit(splits.train)
    made = []
    for title, name in {"majority": "majority", "TF-IDF + logistic regression": "tfidf"}.items():
        found = measure_baseline(name, task, splits.train, splits.test)
        made.append({"method": title, **found.metrics, **found.costs})
    return made, notes


def _lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line]
