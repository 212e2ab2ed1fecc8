"""The loss from hidden states: equal to the plain one, and taken only where it is."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models import VOCAB, tiny
from tunewise.core.errors import RunError
from tunewise.core.handle import Handle, attach
from tunewise.core.part import Part
from tunewise.core.recipe import Recipe
from tunewise.core.run import Run
from tunewise.data import Columns
from tunewise.delta.existing import ExistingWeights
from tunewise.delta.lora import LoRA
from tunewise.delta.prompt import SoftPrompt
from tunewise.head import LMHead
from tunewise.objective.task_loss import TaskLoss
from tunewise.task import linear_loss, make_task
from tunewise.task.base import Batch


def run_of(name: str = "llama", deltas: Any = None, **slots: Any) -> tuple[Run, Handle]:
    """A run on a tiny model whose delta has moved."""
    recipe = Recipe(
        delta=deltas or [LoRA(2)], head=LMHead(), objective=slots.pop("objective", TaskLoss()), **slots
    )
    handle = attach(tiny(name), recipe, seed=1)
    make = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(torch.randn(p.shape, generator=make) * 0.05)
    return Run(handle, task=make_task("causal", Columns(("text",), None, "causal"))), handle


def batch_of(side: str = "right") -> Batch:
    """Three rows of unlike length, of which some positions are supervised."""
    lengths, width = (9, 5, 7), 9
    make = torch.Generator().manual_seed(0)
    ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    for i, n in enumerate(lengths):
        where = slice(n) if side == "right" else slice(width - n, width)
        ids[i, where], mask[i, where] = torch.randint(3, VOCAB, (n,), generator=make), 1
    labels = ids.masked_fill((mask == 0) | (ids % 3 == 0), -100)
    labels[:, 0] = -100
    return Batch(
        {"input_ids": ids, "attention_mask": mask}, labels, ["a", "b", "c"], (labels != -100).sum(1).float()
    )


class Spy:
    """Counts the entries of every table of logits that the output layer makes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.largest, original = 0, F.linear

        def linear(x: Tensor, *rest: Any) -> Tensor:
            y = original(x, *rest)
            if y.shape[-1] == VOCAB:
                self.largest = max(self.largest, y.numel())
            return y

        monkeypatch.setattr(torch.nn.functional, "linear", linear)


def loss_and_gradients(run: Run, handle: Handle, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    run.model.train()
    torch.manual_seed(3)
    loss = run.loss(batch, float(batch.units.sum()))
    loss.backward()
    found = {n: i.tensor.grad.clone() for n, i in handle.tensors().items() if i.tensor.grad is not None}
    for p in handle.parameters():
        p.grad = None
    return loss.detach(), found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("entries", [10, 10_000])
def test_losses_and_gradients_equal_the_plain_ones(
    bias: bool, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_loss, "ENTRIES", entries)
    make = torch.Generator().manual_seed(0)
    h = torch.randn(7, 4, generator=make, dtype=torch.float64, requires_grad=True)
    W = torch.randn(5, 4, generator=make, dtype=torch.float64) * 30  # far from the middle of exp
    b = torch.randn(5, generator=make, dtype=torch.float64) if bias else None
    y = torch.tensor([0, 4, 2, 2, 1, 0, 3])
    found = linear_loss.linear_cross_entropy(h, W, b, y)
    wanted = F.cross_entropy(F.linear(h, W, b), y, reduction="none")
    torch.testing.assert_close(found, wanted)
    weight = torch.randn(7, generator=make, dtype=torch.float64)
    for a, c in zip(
        torch.autograd.grad(found, h, weight), torch.autograd.grad(wanted, h, weight), strict=True
    ):
        torch.testing.assert_close(a, c)
    with pytest.raises(RunError, match="no second derivative"):
        torch.autograd.grad(linear_loss.linear_cross_entropy(h, W, b, y).sum(), h, create_graph=True)


def test_a_trained_layer_gets_its_gradient() -> None:
    h, W = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True)
    linear_loss.linear_cross_entropy(h, W, None, torch.tensor([0, 1, 4])).sum().backward()
    assert W.grad is not None and bool(W.grad.any())


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("deltas", [[LoRA(2)], [SoftPrompt(tokens=3)], [LoRA(2, dropout=0.5)]])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_run_takes_it_and_computes_the_plain_loss(
    name: str, deltas: list[Any], side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batch_of(side)
    monkeypatch.setattr(linear_loss, "ENTRIES", 4 * VOCAB)
    run, handle = run_of(name, deltas)
    spy, state = Spy(monkeypatch), torch.get_rng_state()
    loss, gradients = loss_and_gradients(run, handle, batch)
    assert spy.largest == (8 + deltas[0].positions) * VOCAB  # the trial's tokens, behind a soft prompt
    spy.largest = 0
    assert torch.equal(loss_and_gradients(run, handle, batch)[0], loss)
    assert spy.largest == 4 * VOCAB
    monkeypatch.setattr(LMHead, "states", lambda *_: None)
    torch.set_rng_state(state)
    plain, wanted = loss_and_gradients(run, handle, batch)
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-6)
    assert gradients.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(gradients[key], value, rtol=1e-5, atol=1e-6)
    assert run.sample_losses.keys() == {"a", "b", "c"}


class Deaf(Part):
    """A loss that reads logits."""

    slot: ClassVar[str] = "objective"
    weight: float = 1.0

    def loss(self, run: Run, batch: Any, logits: Tensor, outputs: Any, units: float) -> Tensor:
        assert logits.abs().sum() > 0
        return logits.square().mean()


class Curvature(Part):
    slot: ClassVar[str] = "diagnose"
    needs: ClassVar[frozenset[str]] = frozenset({"second_order"})


def heard(run: Run) -> None:
    run.model.register_forward_hook(lambda *_: None)


def hooked(run: Run) -> None:
    run.model.get_output_embeddings().register_forward_hook(lambda *_: None)  # type: ignore[operator]


def scaled(run: Run) -> None:
    """A model whose logits are more than its layer's answer."""
    model: Any = run.model
    inner = model.forward

    def forward(**inputs: Any) -> Any:
        outputs = inner(**inputs)
        outputs.logits = outputs.logits * 2
        return outputs

    model.forward = forward


def nothing(run: Run) -> None:
    """Leaves the run as it is."""


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"deltas": [LoRA(2, sites="head")]}, nothing),
        ({"deltas": [ExistingWeights("head")]}, nothing),
        ({"deltas": [ExistingWeights("embedding")], "name": "gpt2"}, nothing),  # tied to the head
        ({"objective": [TaskLoss(), Deaf()]}, nothing),
        ({"diagnose": Curvature()}, nothing),
        ({}, heard),
        ({}, hooked),
        ({}, scaled),
    ],
)
def test_the_plain_way_where_logits_are_needed(
    options: dict[str, Any], change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, handle = run_of(**options)
    change(run)
    spy = Spy(monkeypatch)
    loss, gradients = loss_and_gradients(run, handle, batch_of())
    assert loss > 0 and gradients
    assert spy.largest == 27 * VOCAB or run.handle.sites[0][1].role == "head"  # fused there


def test_an_objective_of_weight_zero_hears_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    run, handle = run_of(objective=[TaskLoss(), Deaf(weight=0.0)])
    spy = Spy(monkeypatch)
    monkeypatch.setattr(linear_loss, "ENTRIES", VOCAB)
    loss_and_gradients(run, handle, batch_of())
    assert spy.largest == 8 * VOCAB


def test_the_trial_leaves_no_trace() -> None:
    run, _ = run_of(deltas=[LoRA(2, dropout=0.5)])
    run.model.train()
    layer: nn.Module = run.model.get_output_embeddings()  # type: ignore[operator]
    state = torch.get_rng_state()
    assert LMHead().states(run, batch_of()) is not None
    drawn = torch.get_rng_state()
    assert run.model.training and "forward" not in layer.__dict__
    torch.set_rng_state(state)
    assert LMHead().states(run, batch_of()) is not None
    assert torch.equal(drawn, torch.get_rng_state())


def test_under_autocast_the_logits_are_those_of_the_layer() -> None:
    h, y = torch.randn(6, 16, requires_grad=True), torch.tensor([0, 1, 2, 3, 4, 0])
    W = torch.randn(5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found, logits = linear_loss.linear_cross_entropy(h, W, None, y), F.linear(h, W)
    assert logits.dtype is torch.bfloat16 and found.dtype is torch.float32
    wanted = F.cross_entropy(logits.float(), y, reduction="none")
    torch.testing.assert_close(found, wanted)
    for a, b in zip(*(torch.autograd.grad(v.sum(), h) for v in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
