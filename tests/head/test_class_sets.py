"""Several tasks behind one classifier: each row is answered among its own task's classes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.models import tiny
from tunewise.core.errors import UserError
from tunewise.head.class_sets import ClassSetHead

LABELS = ["nli/no", "nli/yes", "nli/maybe", "film/bad", "film/good"]


def head(labels: list[str] = LABELS) -> tuple[ClassSetHead, Any]:
    model: Any = tiny("bert")
    model.config.num_labels = len(labels)
    found = ClassSetHead()
    found.setup(SimpleNamespace(name="classification", labels=labels), None, model)
    return found, model


def read(part: ClassSetHead, logits: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    return part.logits(
        None, SimpleNamespace(logits=logits), SimpleNamespace(inputs={}, ids=[], labels=labels)
    )


def test_loss_is_the_mean_of_each_tasks_own() -> None:
    part, _ = head()
    logits, labels = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 2, 3, 4])
    found = F.cross_entropy(read(part, logits, labels), labels)
    own = [F.cross_entropy(logits[:2, :3], labels[:2]), F.cross_entropy(logits[2:, 3:], labels[2:] - 3)]
    torch.testing.assert_close(found, (own[0] + own[1]) / 2)
    (grad,) = torch.autograd.grad(found, logits)
    assert grad.isfinite().all() and not grad[:2, 3:].any() and not grad[2:, :3].any()


def test_answers_stay_in_the_set_where_it_is_known() -> None:
    part, _ = head()
    logits = torch.tensor([[0.0, 1.0, 0.5, 9.0, 2.0]])
    assert read(part, logits, torch.tensor([1])).argmax() == 1
    assert read(part, logits, None).argmax() == 3


def test_one_set_is_the_plain_head_and_one_class_is_refused() -> None:
    part, _ = head(["a", "b"])
    logits = torch.randn(3, 2)
    assert torch.equal(read(part, logits, torch.tensor([0, 1, 0])), logits)
    with pytest.raises(UserError, match='The task "film" has one class'):
        head(["nli/no", "nli/yes", "film/bad"])
