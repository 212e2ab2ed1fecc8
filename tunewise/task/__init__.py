"""Tasks: how rows become batches, how logits are read, the base loss, the metrics."""

from __future__ import annotations

import inspect
from typing import Any

from tunewise.core.errors import UserError, did_you_mean
from tunewise.data import Columns

from .base import Batch, Metric, Task
from .causal import Causal
from .classification import Classification
from .regression import Regression

__all__ = ["TASKS", "Batch", "Causal", "Classification", "Metric", "Regression", "Task", "make_task"]
__all__ += ["task_class"]

TASKS: dict[str, type[Task]] = {cls.name: cls for cls in (Classification, Regression, Causal)}


def task_class(name: str) -> type[Task]:
    """The class of a task by name; UserError with near names."""
    if name not in TASKS:
        raise UserError(f'There is no task "{name}"{did_you_mean(name, TASKS)}')
    return TASKS[name]


def make_task(name: str | None, columns: Columns, **options: Any) -> Task:
    """The task `name` (None: the detected one) for these columns; UserError for an unknown option."""
    cls = task_class(name or columns.task)
    known = {**inspect.signature(Task.__init__).parameters, **inspect.signature(cls.__init__).parameters}
    names = [n for n in known if n not in ("self", "columns", "options")]
    for option in options:
        if option not in names:
            raise UserError(f'The task {cls.name} has no option "{option}"{did_you_mean(option, names)}')
    return cls(columns, **options)
