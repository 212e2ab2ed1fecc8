"""The trials of a study, one by one and as flat tables."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Trial", "curves_table", "trials_table", "write_parquet"]

PLAIN = ("id", "method", "rate", "seed", "rung", "steps", "status", "reason", "attempts", "directory")
TIMES = ("started", "ended")


@dataclass(frozen=True)
class Trial:
    """One row. `directory` is relative to the study's folder; `cost` is in seconds, over all attempts."""

    id: int
    method: str
    rate: float | None
    seed: int
    rung: int
    steps: int
    status: str = "waiting"
    reason: str | None = None
    attempts: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)
    curve: list[dict[str, Any]] = field(default_factory=list)
    directory: str = ""
    started: float | None = None
    ended: float | None = None
    cost: float = 0.0

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Trial:
        """From a row of the database, whose trees are JSON text."""
        return cls(**{**row, "metrics": json.loads(row["metrics"]), "curve": json.loads(row["curve"])})


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{before}{key}/")
        else:
            found[before + key] = json.dumps(value) if isinstance(value, list) else value
    return found


def trials_table(trials: Sequence[Trial]) -> Any:
    """One row per trial: its columns, then its metrics, nested ones as `a/b`; times are UTC, cost in seconds."""
    import pandas as pd

    columns = [*PLAIN, *TIMES, "cost"]
    rows = []
    for trial in trials:
        facts = asdict(trial)
        row = {name: facts[name] for name in columns}
        for key, value in _flat(trial.metrics).items():
            row[f"metrics/{key}" if key in columns else key] = value
        rows.append(row)
    names = list(dict.fromkeys([*columns, *(name for row in rows for name in row)]))
    table = pd.DataFrame(rows, columns=names)
    for name in TIMES:
        table[name] = pd.to_datetime(table[name], unit="s", utc=True)
    return table.astype({"rate": float, "cost": float})


def curves_table(trials: Sequence[Trial]) -> Any:
    """One row per point of a learning curve: id, method, rate, seed, rung, then what the point tells."""
    import pandas as pd

    columns = ["id", "method", "rate", "seed", "rung"]
    rows = [{**_flat(point), **{c: getattr(t, c) for c in columns}} for t in trials for point in t.curve]
    names = list(dict.fromkeys([*columns, *(name for row in rows for name in row)]))
    return pd.DataFrame(rows, columns=names)


def write_parquet(table: Any, path: Path) -> Path:
    """A column that holds several kinds of values is written as JSON text, since Parquet has one kind per column."""
    table = table.copy()
    for name in [name for name in table.columns if table[name].dtype.kind == "O"]:
        values = table[name]
        known = values[values.notna()]
        if len({type(v) for v in known}) > 1:
            table[name] = values.map(json.dumps, na_action="ignore")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    table.to_parquet(part, index=False)
    os.replace(part, path)
    return path
