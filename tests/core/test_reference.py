"""Contract 10: the model as it was, without a second copy of the backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tunewise.core.errors import UserError
from tunewise.core.part import Part
from tunewise.core.recipe import Recipe
from tunewise.core.run import Run
from tunewise.delta.lora import LoRA

from .toys import ToyBatch, interrupted, run_of, same_state, start


def fixed(run: Run) -> ToyBatch:
    return run.collate(list(run.streams.data["valid"])[:4])  # type: ignore[no-any-return]


def logits(run: Run) -> Tensor:
    run.model.eval()
    with torch.no_grad():
        return run.model(**fixed(run).inputs).logits  # type: ignore[no-any-return]


def held(run: Run, which: str) -> int:
    return sum(v.numel() for v in run.reference(which).kept.values())


@pytest.mark.parametrize(
    "method", ["lora(rank=2)", "full", "head_only", "bias_scale", "lora(rank=2) + head_only"]
)
def test_the_start_costs_no_copy_where_it_can_be_switched_off(method: str) -> None:
    run = run_of(method)
    before = logits(run)
    reference = run.reference("start")
    start(run)
    moved = logits(run)
    assert held(run, "start") == 0 and sum(p.numel() for p in run.model.parameters()) < 60_000
    assert not torch.equal(moved, before)
    assert torch.equal(reference(**fixed(run).inputs).logits, before)
    assert torch.equal(logits(run), moved)  # and nothing is left behind


def test_the_start_of_a_prompt_keeps_the_prompt_alone() -> None:
    run = run_of("prompt_tuning(tokens=3)")
    before = logits(run)
    run.reference("start")
    start(run)
    assert held(run, "start") == 3 * 32 and torch.equal(
        run.reference("start")(**fixed(run).inputs).logits, before
    )


def test_a_start_that_is_gone_is_refused() -> None:
    run = start(run_of("prompt_tuning(tokens=3)"))
    with pytest.raises(UserError, match="At step 6 the start of soft_prompt.P is gone: ask for"):
        run.reference("start")


class Previous(Part):
    """Compares the reference at the end of the stage with the model at the end of the epoch."""

    slot: ClassVar[str] = "diagnose"

    def prepare(self, run: Run) -> None:
        run.reference("previous")

    def boundary(self, run: Run, kind: str) -> None:
        if kind == "epoch":
            self.state["then"] = logits(run)
        else:
            self.state |= {
                "previous": run.reference("previous")(**fixed(run).inputs).logits,
                "now": logits(run),
            }


def test_previous_moves_on_at_every_boundary() -> None:
    run = start(run_of(Recipe(delta=LoRA(2), diagnose=Previous()), steps=4))  # an epoch has 3 steps
    state = run.recipe["diagnose"][0].state
    assert torch.equal(state["previous"], state["then"]) and not torch.equal(state["now"], state["then"])
    assert torch.equal(run.reference("previous")(**fixed(run).inputs).logits, state["now"])


def test_a_reference_has_no_dropout_and_leaves_the_modes_alone() -> None:
    run = run_of("lora(rank=2)")
    run.model.train()
    run.model.get_submodule("bert.pooler").eval()
    modes = [m.training for m in run.model.modules()]
    a, b = (run.reference("start")(**fixed(run).inputs).logits for _ in range(2))
    assert torch.equal(a, b) and [m.training for m in run.model.modules()] == modes


class EmaCopy(Part):
    """Ends with the moving average of the weights in the place of the weights."""

    slot: ClassVar[str] = "post"
    decay: float = 0.5

    def prepare(self, run: Run) -> None:
        run.reference("ema", self.decay)

    def after_step(self, run: Run) -> None:
        self.state["seen"] = self.state.get("seen", 0) + 1

    def finish(self, run: Run) -> None:
        run.handle.load_state(run.reference("ema").kept)


class History(Part):
    """Notes every value of one tensor."""

    slot: ClassVar[str] = "diagnose"

    def after_step(self, run: Run) -> None:
        name, info = next(iter(run.tensors.active()))
        self.state.setdefault(name, []).append(info.tensor.detach().clone())


def averaged() -> Recipe:
    return Recipe(delta=LoRA(2), post=EmaCopy(), diagnose=History())


def test_an_ema_copy_follows_each_step() -> None:
    run = run_of(averaged())
    name, info = next(iter(run.tensors.active()))
    mean = info.tensor.detach().clone()
    start(run)
    for value in run.recipe["diagnose"][0].state[name]:
        mean = 0.5 * mean + 0.5 * value
    torch.testing.assert_close(run.tensors.info(name).tensor, mean)
    assert held(run, "ema") == run.handle.trainable


def test_an_ema_copy_resumes_bit_equal(tmp_path: Path) -> None:
    def make(name: str) -> Run:
        return run_of(averaged(), tmp_path / name, checkpoint_every=2)

    whole, cut = start(make("whole")), interrupted(lambda: make("cut"), 5)
    assert same_state(whole, cut)
    assert whole.recipe["post"][0].state == {"seen": 6} == cut.recipe["post"][0].state
    assert not same_state(whole, start(run_of("lora(rank=2)")))


def test_a_saved_adaptation_is_a_reference(tmp_path: Path) -> None:
    first = start(run_of("lora(rank=2)"))
    first.handle.save(tmp_path)
    second = run_of("lora(rank=2)")
    before = logits(second)
    assert torch.equal(second.reference(str(tmp_path))(**fixed(second).inputs).logits, logits(first))
    assert torch.equal(logits(second), before)


@pytest.mark.parametrize(
    ("which", "words"),
    [("strat", '"start", "previous", "ema" or the folder'), ("other", "belongs to another recipe")],
)
def test_a_wrong_reference_is_refused(tmp_path: Path, which: str, words: str) -> None:
    start(run_of("lora(rank=2, sites='query')")).handle.save(tmp_path)
    with pytest.raises(UserError, match=words):
        run_of("lora(rank=2)").reference(str(tmp_path) if which == "other" else which)


class Anchor(Part):
    """|f(x) - f_start(x)|^2, with the reference called inside the loss, between forward and backward."""

    slot: ClassVar[str] = "objective"
    weight: float = 1.0

    def prepare(self, run: Run) -> None:
        run.reference("start")

    def loss(self, run: Run, batch: Any, logits: Tensor, outputs: Any, units: float) -> Tensor:
        was = run.reference("start")(**batch.inputs).logits
        return (logits - was).square().sum() / units


def test_a_reference_may_be_asked_between_forward_and_backward() -> None:
    from tunewise.objective.task_loss import TaskLoss

    def run_with(weight: float) -> Run:
        recipe = Recipe(delta=LoRA(2), objective=[TaskLoss(), Anchor(weight)])
        return start(run_of(recipe, dropout=False, steps=12))

    free, held_back = run_with(0.0), run_with(100.0)
    gap = [
        float((logits(r) - r.reference("start")(**fixed(r).inputs).logits).abs().max())
        for r in (free, held_back)
    ]
    assert gap[1] < 0.5 * gap[0]
    assert same_state(free, start(run_of("lora(rank=2)", dropout=False, steps=12)))
