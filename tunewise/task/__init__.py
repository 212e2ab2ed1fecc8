"""Tasks: how rows become batches, how outputs are read, base loss and metrics."""

from __future__ import annotations

import inspect
from typing import Any

from tunewise.core.errors import UserError, did_you_mean
from tunewise.data import Columns
from tunewise.task.base import Batch, Task
from tunewise.task.causal import CausalLM
from tunewise.task.classification import Classification
from tunewise.task.generate import generate, generation_metrics
from tunewise.task.image import ImageClassification
from tunewise.task.regression import Regression
from tunewise.task.text import tokenize

__all__ = [
    "TASKS",
    "Batch",
    "CausalLM",
    "Classification",
    "ImageClassification",
    "Regression",
    "Task",
    "generate",
    "generation_metrics",
    "make_task",
    "tokenize",
]

TASKS: dict[str, type[Task]] = {
    cls.name: cls for cls in (Classification, ImageClassification, Regression, CausalLM)
}
# What other libraries call them, in lower case with "_".
OTHER_NAMES = {
    "seq_cls": "classification",
    "text_classification": "classification",
    "sequence_classification": "classification",
    "causal_lm": "causal",
    "text_generation": "causal",
    "sft": "causal",
    "image": "image_classification",
    "image_cls": "image_classification",
    "vision": "image_classification",
}


def make_task(name: str | None, columns: Columns, **options: Any) -> Task:
    """The task called `name` on these columns: one of `TASKS`; None: as detected.

    Options: max_length (texts), image_size (images), metric, higher_is_better (of one's own); chat (causal).
    Raises `UserError` with the nearest right spelling.
    """
    name = name or columns.task
    if name not in TASKS:
        ours = OTHER_NAMES.get(name.lower().replace("-", "_"))
        if ours:
            raise UserError(f'There is no task "{name}": here it is called "{ours}".')
        raise UserError(f'There is no task "{name}"{did_you_mean(name, TASKS)}')
    known = [n for n in inspect.signature(TASKS[name].__init__).parameters if n not in ("self", "columns")]
    for option in options:
        if option not in known:
            raise UserError(f'The task {name} has no option "{option}"{did_you_mean(option, known)}')
    return TASKS[name](columns, **options)
