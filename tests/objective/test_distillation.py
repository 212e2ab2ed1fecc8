"""A source task's prompt as teacher: weight 0, an equal teacher, and that the teacher stays as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.core.toys import run_of, start
from tunewise.core.errors import UserError
from tunewise.core.recipe import Recipe
from tunewise.core.run import Run
from tunewise.delta.prefix import Prefix
from tunewise.head import ClassHead
from tunewise.objective.distillation import Distillation
from tunewise.objective.task_loss import TaskLoss


def recipe(teacher: Path | None = None, tokens: int = 3, **options: object) -> Recipe:
    objective = [TaskLoss(), Distillation(None if teacher is None else str(teacher), **options)]  # type: ignore[arg-type]
    return Recipe(delta=Prefix(tokens), head=ClassHead(), objective=objective)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    run = start(run_of(Recipe(delta=Prefix(3), head=ClassHead()), lr=3e-2))
    run.handle.save(tmp_path / "source" / "adaptation")
    return tmp_path / "source"


def term(run: Run) -> torch.Tensor:
    batch = run.collate(list(run.streams.data["train"])[:8])
    logits, outputs = run.forward(batch)
    found: torch.Tensor = run.recipe["objective"][1].loss(run, batch, logits, outputs, 8.0)  # type: ignore[attr-defined]
    return found


def test_weight_zero_is_prompt_tuning(teacher: Path) -> None:
    plain = start(run_of(Recipe(delta=Prefix(3), head=ClassHead())))
    zero = start(run_of(recipe(teacher, weight=0.0)))
    loud = start(run_of(recipe(teacher, weight=1.0)))
    for name, value in plain.handle.state().items():
        assert torch.equal(zero.handle.state()[name], value)
    assert any(not torch.equal(loud.handle.state()[n], v) for n, v in plain.handle.state().items())


def test_the_value_and_an_equal_teacher(teacher: Path) -> None:
    run = run_of(recipe(teacher), dropout=False)
    run.fire("prepare")
    batch = run.collate(list(run.streams.data["train"])[:8])
    mine = run.forward(batch)[0].detach()
    found = term(run)
    kept = {n: v.clone() for n, v in run.handle.state().items()}
    run.handle.load_state(source(teacher))
    theirs = run.forward(batch)[0].detach()
    torch.testing.assert_close(found.detach(), (mine - theirs).square().mean())
    assert float(term(run)) == 0.0
    run.handle.load_state(kept)
    term(run).backward()
    assert all(i.tensor.grad is not None for n, i in run.handle.tensors().items() if "prefix" in n)


def source(teacher: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(teacher / "adaptation" / "adaptation.safetensors")


def test_the_teacher_stays_and_teaches(teacher: Path) -> None:
    before = source(teacher)
    run = run_of(recipe(teacher, weight=5.0), dropout=False, lr=3e-2, steps=30)
    run.fire("prepare")
    first = float(term(run).detach())
    assert float(term(start(run)).detach()) < 0.5 * first
    assert all(torch.equal(v, before[n]) for n, v in run.reference(str(teacher / "adaptation")).kept.items())


def test_ramp_goes_up_and_down() -> None:
    part = Distillation("x", schedule="ramp")
    run = run_of(recipe())
    run.total_steps = 20
    factors = []
    for run.step in range(20):
        factors.append(part.factor(run))
    assert factors[0] == 0.5 and max(factors) == 1.0 == factors[1]
    assert factors[1:] == sorted(factors[1:], reverse=True) and 0 < factors[-1] < 0.1


def test_a_teacher_that_does_not_fit_is_refused(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="shape"):
        start(run_of(recipe(teacher, tokens=4)))
    with pytest.raises(UserError, match="holds no adaptation"):
        start(run_of(recipe(tmp_path / "nowhere")))
    more = [Prefix(3), Prefix(2)]
    other = Recipe(delta=more, head=ClassHead(), objective=recipe(teacher)["objective"])
    with pytest.raises(UserError, match="another recipe"):
        start(run_of(other))
