"""Small studies with made-up trials whose right answers are known."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tunewise.study.judge.findings import findings
from tunewise.study.schedule import MEASURE
from tunewise.study.store import Store

ROWS = 400
FACTS = {
    "model": "minilm",
    "data": "reviews",
    "task": "classification",
    "metric": "accuracy",
    "higher_is_better": True,
    "budget": 600.0,
    "prefer": "quality",
    "batch_size": 32,
    "command": "tunewise compare minilm reviews",
    "environment": {"torch": "2"},
}
COSTS = {"seconds": 60.0, "peak_memory_mb": 500.0, "trainable": 1000, "size_mb": 4.0}


class MadeStudy:
    """A store in a folder, and shorthands for what trials write into it."""

    def __init__(self, folder: Path, **facts: Any) -> None:
        self.store = Store.open(folder, {})
        self.store.set("facts", {**FACTS, **facts})
        self.store.set("spent", 570.0)
        self.ids = [f"row-{i}" for i in range(ROWS)]
        self.truth = np.array(["pos", "neg"] * (ROWS // 2), dtype=object)

    def tuned(self, method: str, rate: float | None, score: float, **facts: Any) -> None:
        """One finished tuning trial."""
        key = {"seed": 0, "rung": 0, "steps": 10} | {
            k: facts.pop(k) for k in ("seed", "rung", "steps") if k in facts
        }
        trial = self.store.start(self.store.add(method, rate, **key).id)
        metrics = {"score": score, "valid/accuracy": score, "peak_memory_mb": 480.0, "trainable": 7, **facts}
        self.store.finish(trial.id, metrics, [{"step": 10, "loss": 0.5}], cost=5.0)

    def measured(
        self,
        method: str,
        rate: float | None,
        seed: int,
        metrics: Mapping[str, Any],
        rows: pd.DataFrame | None,
    ) -> int:
        """One trial that was measured on test rows; `rows` is its test.parquet."""
        trial = self.store.add(method, rate, seed=seed, rung=MEASURE, steps=0 if rate is None else 90)
        self.store.start(trial.id)
        if rows is not None:
            self.store.path(trial).mkdir(parents=True, exist_ok=True)
            rows.to_parquet(self.store.path(trial) / "test.parquet", index=False)
        self.store.finish(trial.id, metrics, cost=20.0)
        return trial.id

    def classified(
        self, method: str, wrong: Any, *, rate: float | None = 1e-3, seed: int = 0, **facts: Any
    ) -> int:
        """A classifier that is wrong on these rows, by number."""
        said = self.truth.copy()
        said[list(wrong)] = np.where(said[list(wrong)] == "pos", "neg", "pos")
        right = float((said == self.truth).mean())
        metrics = {
            "accuracy": right,
            "accuracy_low": 0.1,
            "accuracy_high": 0.9,
            "kind": "tuned",
            **COSTS,
            **facts,
        }
        return self.measured(method, rate, seed, metrics, self.frame(reference=self.truth, prediction=said))

    def baseline(self, method: str, wrong: Any, **facts: Any) -> int:
        costs = {"seconds": 0.1, "trainable": 0}
        plain = {"kind": "baseline", "peak_memory_mb": None, "size_mb": None, **costs, **facts}
        return self.classified(method, wrong, rate=None, **plain)

    def frame(self, **columns: Any) -> pd.DataFrame:
        return pd.DataFrame({"id": self.ids, **columns})

    def find(self, **options: Any) -> dict[str, Any]:
        """The findings of another reader; they must be JSON."""
        with Store.read(self.store.folder) as other:
            found = findings(other, **options)
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        return found


def rows_of(found: Mapping[str, Any]) -> dict[str, Any]:
    return {row["method"]: row for row in found["rows"]}
