"""Progress bars of a run: steps with loss and rate, then the rows that are evaluated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["Progress"]


class Progress:
    """A rich progress bar, or nothing when it is switched off or the output is no terminal."""

    def __init__(self, on: bool, title: str) -> None:
        self.on, self.title = on, title
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if self.on:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def row(self, row: dict[str, Any], run: Any) -> None:
        """Shows one row of metrics.jsonl."""
        if self._bar is None or not run.total_steps:
            return
        if self._task is None:
            self._task = self._bar.add_task(self.title, total=run.total_steps, note="")
        note = f"loss {row['loss']:.3f}" if "loss" in row else None
        valid = next((f"{k} {v:.3f}" for k, v in row.items() if k == f"valid/{run.task.metric}"), None)
        shown = valid or note
        self._bar.update(self._task, completed=run.step, **({"note": shown} if shown else {}))

    def stage(self, name: str, total: int) -> Callable[[int], None] | None:
        """A further bar; call the result with the number of rows done."""
        if self._bar is None:
            return None
        task = self._bar.add_task(name, total=total, note="")
        return lambda count: self._bar.advance(task, count)
