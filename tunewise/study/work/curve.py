"""The log of a trial: learning curve, time in its steps, signs of life."""

from __future__ import annotations

import time
from typing import Any

from tunewise.study.work.worker_main import report

__all__ = ["Curve"]

POINTS = 200
SIGN = 0.3


class Curve:
    """Rows of a run's log: kept for the learning curve, told to the parent, and timed between two steps.

    What is kept lies in the run's own state, so that a trial that was killed after its last checkpoint still knows
    what it took; it begins anew with each rung.
    """

    def __init__(self, run: Any, steps: int) -> None:
        self.run, self.steps = run, steps
        self._last = self._told = time.perf_counter()

    @property
    def kept(self) -> dict[str, Any]:
        """{"steps": of the rung, "training": seconds, "tokens", "rows"}"""
        found: dict[str, Any] = self.run.extra.setdefault("trial", {})
        if found.get("steps") != self.steps:
            found.clear()
            found |= {"steps": self.steps, "training": 0.0, "tokens": 0, "rows": []}
        return found

    def __call__(self, row: dict[str, Any]) -> None:
        now, kept = time.perf_counter(), self.kept
        if "loss" in row:
            kept["training"] += now - self._last
            kept["tokens"] += int(row.get("tokens", 0))
        self._last = now
        if "resumed" not in row:
            kept["rows"].append({k: v for k, v in row.items() if k != "tokens"})
        if now - self._told >= SIGN:
            self._told = now
            report({"step": row["step"], "steps": self.steps})

    def thinned(self) -> list[dict[str, Any]]:
        """Looks as they are, and at most POINTS means of equal stretches of the training loss."""
        rows = self.kept["rows"]
        looks = [row for row in rows if "loss" not in row and len(row) > 1]
        losses = [row for row in rows if "loss" in row]
        stride = max(1, -(-len(losses) // POINTS))
        means = []
        for i in range(0, len(losses), stride):
            part = losses[i : i + stride]
            mean = sum(row["loss"] for row in part) / len(part)
            means.append({"step": part[-1]["step"], "loss": mean, "lr": part[-1]["lr"]})
        return sorted([*means, *looks], key=lambda row: row["step"])
