"""PGD on embeddings: the ball, what it changes, and that nothing of the search is left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.conformance.support import Case
from tests.conformance.training_checks import training_run
from tunewise.core.method import get_method
from tunewise.core.recipe import Recipe
from tunewise.core.run import Run
from tunewise.objective.adversarial import Adversarial, perturbation


def made(method: str = "mvp", **options: Any) -> tuple[Run, Any]:
    run = training_run(Case(method, lambda: get_method(method)(**options)), rows=6, still=True)
    return run, run.collate(list(run.streams.data["train"]))


@pytest.mark.parametrize(("norm", "steps"), [("l2", 1), ("l2", 3), ("linf", 1), ("linf", 2)])
def test_the_change_stays_in_its_ball_and_off_the_padding(norm: str, steps: int) -> None:
    run, batch = made()
    part = Adversarial(radius=0.7, steps=steps, norm=norm)  # type: ignore[arg-type]
    run.model.train()
    d = perturbation(part, run, batch)
    size = d.flatten(1).norm(dim=1) if norm == "l2" else d.abs().flatten(1).amax(1)
    assert bool((size <= 0.7 * (1 + 1e-5)).all()) and bool((size > 0.05).all())
    assert len(d) == 4 * 6 and not d[batch.inputs["attention_mask"] == 0].any()
    assert run.model.training and all(p.grad is None for p in run.model.parameters())
    assert not run.model.get_input_embeddings()._forward_hooks


def test_it_raises_the_loss_and_more_steps_do_so_more() -> None:
    run, batch = made()
    run.model.eval()
    clean = run.task.losses(run.forward(batch)[0], batch).sum()
    losses = []
    for steps in (1, 5):
        part = Adversarial(radius=1.0, steps=steps)
        losses.append(float(part.loss(run, batch, clean, None, 1.0)))
    assert losses[0] > float(clean) and losses[1] > losses[0]


def test_a_tiny_ball_is_the_clean_loss_and_gradients_reach_the_parameters() -> None:
    run, batch = made(adversarial=1.0, radius=1e-6)
    run.model.eval()
    clean = run.task.losses(run.forward(batch)[0], batch).sum() / 6
    both = run.loss(batch, 6.0)
    assert torch.allclose(both, 2 * clean, rtol=1e-4)
    both.backward()
    assert all(p.grad is not None for p in run.handle.parameters())


def test_draws_do_not_depend_on_micro_batches() -> None:
    (one, batch), (two, _) = made(), made()
    part = Adversarial(steps=1)
    whole = perturbation(part, one, batch)
    examples = list(two.streams.data["train"])
    parts = [perturbation(part, two, two.collate(examples[i : i + 2])) for i in range(0, 6, 2)]
    for i, piece in enumerate(parts):
        assert torch.allclose(whole[8 * i : 8 * i + 8, : piece.shape[1]], piece, atol=1e-4)


def test_weight_zero_leaves_it_out_and_other_methods_can_use_it() -> None:
    assert len(get_method("mvp")()["objective"]) == 1
    run = training_run(
        Case("lora", lambda: get_method("lora")() + Recipe(objective=Adversarial(radius=0.1))), rows=4
    )
    batch = run.collate(list(run.streams.data["train"]))
    assert perturbation(Adversarial(), run, batch).shape[0] == 4
