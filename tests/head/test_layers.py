"""Class attention over layers: weights, the gold query, no label in evaluation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.head.test_cloze import TASK, tokenizer
from tests.models import tiny
from tunewise.core.errors import UserError
from tunewise.core.handle import attach
from tunewise.head import LayersHead


def made(layers: int, **options: Any) -> tuple[LayersHead, Any, Any, Any]:
    """(head, its tensors, outputs of random states, a batch of two rows)."""
    torch.manual_seed(0)
    head = LayersHead(template="{text} {mask}", layers=layers, **options)
    head.setup(TASK, tokenizer(), tiny("roberta"))
    ids = torch.tensor([[5, 2, 0], [5, 5, 2]])
    batch = SimpleNamespace(
        inputs={"input_ids": ids, "attention_mask": ids.ne(0).long()},
        ids=["a", "b"],
        labels=torch.tensor([1, 0]),
    )
    outputs = SimpleNamespace(hidden_states=tuple(torch.randn(2, 3, 8) for _ in range(4)))
    t = SimpleNamespace(
        weight=torch.randn(2, 8), bias=torch.randn(2), diagonal=torch.rand(8) + 0.5, training=False
    )
    return head, t, outputs, batch


def by_hand(t: Any, outputs: Any, row: int, at: int, layers: int) -> torch.Tensor:
    """log of the test formula, class by class."""
    H = torch.stack([h[row, at] for h in outputs.hidden_states[-layers:]])
    found = []
    for c in range(2):
        a = (H @ (t.weight[c] * t.diagonal)).softmax(0)
        assert abs(float(a.sum()) - 1) < 1e-6
        found.append((t.weight @ (a[:, None] * H).sum(0) + t.bias).log_softmax(0)[c])
    return torch.stack(found)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_evaluation_asks_with_every_class_and_reads_no_label(layers: int) -> None:
    head, t, outputs, batch = made(layers)
    wanted = torch.stack([by_hand(t, outputs, 0, 1, layers), by_hand(t, outputs, 1, 2, layers)])
    assert torch.allclose(head.logits(t, outputs, batch), wanted, atol=1e-5)
    batch.labels = None
    assert torch.allclose(head.logits(t, outputs, batch), wanted, atol=1e-5)


def test_one_layer_is_a_linear_layer_and_training_agrees_with_evaluation() -> None:
    head, t, outputs, batch = made(1, query="gold")
    H = torch.stack([outputs.hidden_states[-1][0, 1], outputs.hidden_states[-1][1, 2]])
    evaluated = head.logits(t, outputs, batch)
    t.training = True
    trained = head.logits(t, outputs, batch)
    assert torch.allclose(trained, H @ t.weight.T + t.bias, atol=1e-5)
    assert torch.allclose(evaluated, trained.log_softmax(1), atol=1e-5)
    loss = [F.cross_entropy(x, batch.labels) for x in (evaluated, trained)]
    assert torch.allclose(*loss, atol=1e-5)


def test_the_gold_query_is_the_labels_row() -> None:
    head, t, outputs, batch = made(2, query="gold")
    t.training = True
    found = head.logits(t, outputs, batch)
    H = torch.stack([h[0, 1] for h in outputs.hidden_states[-2:]])
    a = (H @ (t.weight[1] * t.diagonal)).softmax(0)
    assert torch.allclose(found[0], t.weight @ (a @ H) + t.bias, atol=1e-5)
    other, t2, outputs, batch = made(2, query="all")
    t2.training = True
    trained = other.logits(t2, outputs, batch)
    t2.training = False
    assert torch.equal(trained, other.logits(t2, outputs, batch))


def test_it_learns_on_a_model_and_says_what_it_needs() -> None:
    model, (head, _, _, batch) = tiny("roberta"), made(2)
    handle = attach(model, head)
    assert handle.trainable == 2 * 32 + 2 + 32
    t = handle.sites[0][2]
    with pytest.raises(UserError, match="output_hidden_states=True"):
        head.logits(t, model(**batch.inputs), batch)
    logits = t.part.logits(t, model(**batch.inputs, **head.asks), batch)  # type: ignore[operator]
    F.cross_entropy(logits, batch.labels).backward()
    assert all(p.grad is not None and p.grad.any() for p in handle.parameters())
    with pytest.raises(UserError, match="the model has 2"):
        made(3)[0].logits(t, model(**batch.inputs, **head.asks), batch)
    with pytest.raises(UserError, match="outputs=N"):
        attach(tiny("roberta"), LayersHead())
    with pytest.raises(UserError, match="tells labels apart"):
        LayersHead().setup(SimpleNamespace(name="regression"), tokenizer(), model)
