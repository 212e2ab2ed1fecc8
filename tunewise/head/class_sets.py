"""softmax over the row's own task's classes: several tasks, each with its label set, behind one model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tunewise.core.errors import UserError

from .base import label_names
from .classification import ClassHead

__all__ = ["ClassSetHead"]


class ClassSetHead(ClassHead):
    """logits_c = -inf for classes of other tasks; classes are named "task<separator>class", `[rows, classes]`.

    A row's task is the one that its label belongs to, in training and evaluation, as each data set's own classes
    alone are in question. Rows without labels (predictions) are answered among all classes. Class names without the
    separator are one set, which is ClassHead.
    sets  learnt from the task: the number of each class's set
    Raises `UserError` for a set of one class, which there is nothing to learn from.
    """

    separator: str = "/"
    sets: list[int] | None = None

    def setup(self, task: Any, tokenizer: Any, model: nn.Module) -> None:
        super().setup(task, tokenizer, model)
        owners = [n.partition(self.separator)[0] if self.separator in n else "" for n in label_names(task)]
        names = sorted(set(owners))
        lonely = next((n for n in names if owners.count(n) == 1), None)
        if lonely is not None:
            which = f'The task "{lonely}"' if lonely else f'What is named without "{self.separator}"'
            raise UserError(f"ClassSetHead: {which} has one class alone, and a choice needs two.")
        self.sets = [names.index(owner) for owner in owners]

    def logits(self, t: Any, outputs: Any, batch: Any) -> Tensor:
        found = super().logits(t, outputs, batch)
        labels = getattr(batch, "labels", None)
        if labels is None or self.sets is None or len(set(self.sets)) < 2:
            return found
        sets = torch.tensor(self.sets, device=found.device)
        return found.masked_fill(sets[labels].unsqueeze(1) != sets, -torch.inf)
