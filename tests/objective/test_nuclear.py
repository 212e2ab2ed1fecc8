"""|W' * M|_* of one drawn weight."""

from __future__ import annotations

import pytest
import torch

from tests.core.toys import run_of
from tunewise.core.errors import UserError
from tunewise.core.recipe import Recipe
from tunewise.core.run import Run
from tunewise.delta.entries import SparseEntries
from tunewise.delta.select_entries import Uniform
from tunewise.objective.nuclear import NuclearNorm
from tunewise.objective.task_loss import TaskLoss


def made(wider: int = 16, share: float = 0.5) -> Run:
    delta = SparseEntries(Uniform(share=share), sites="query | value")
    return run_of(Recipe(delta=delta, objective=[TaskLoss(), NuclearNorm(1.0, wider)]))


def loss(run: Run, size: int = 8) -> torch.Tensor:
    rows, part = list(run.streams.data["train"][:8]), run.recipe["objective"][1]
    batches = [run.collate(rows[i : i + size]) for i in range(0, 8, size)]
    return sum(part.loss(run, b, torch.zeros(size, 2), None, 8.0) for b in batches)  # type: ignore[attr-defined,no-any-return]


def test_value_gradient_and_micro_batches() -> None:
    run = made()
    run.fire("before_step")
    site, t = [(s, t) for _, s, t in run.handle.sites if t.part.slot == "delta"][
        run.recipe["objective"][1].state["place"]
    ]
    mask = torch.zeros(32 * 32).index_fill(0, t.index.long(), 1.0).view(32, 32)
    W = (site.module.weight.detach() * mask).requires_grad_()
    wanted = torch.linalg.svdvals(W).sum()
    torch.testing.assert_close(loss(run), wanted)
    torch.testing.assert_close(loss(run, 2), wanted)
    (grad,) = torch.autograd.grad(wanted, W)
    (found,) = torch.autograd.grad(loss(run), t.values)
    torch.testing.assert_close(found, grad.reshape(-1)[t.index.long()], rtol=1e-4, atol=1e-5)


def test_every_wide_weight_is_drawn() -> None:
    run, seen = made(), set()
    for _ in range(40):
        run.fire("before_step")
        seen.add(run.recipe["objective"][1].state["place"])
    assert seen == {0, 1, 2, 3}


def test_few_entries_are_left_alone_and_narrow_models_are_refused() -> None:
    few = made(share=0.05)
    few.fire("before_step")
    assert float(loss(few)) == 0.0
    with pytest.raises(UserError, match="lower wider"):
        made(wider=64).fire("before_step")
