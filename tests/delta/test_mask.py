"""W' = 1[R > tau] * W: straight-through gradients, penalties, gradient dropout."""

from __future__ import annotations

import torch

from tests.core.toys import run_of, start
from tests.models import tiny
from tunewise.core.handle import attach
from tunewise.core.recipe import Recipe
from tunewise.delta.mask import ThresholdMask
from tunewise.objective.mask_norm import GradientDropout, MaskNorm, agreement
from tunewise.objective.task_loss import TaskLoss


def test_mask_is_strict_and_its_gradient_is_that_of_a_real_mask() -> None:
    model = tiny("llama")
    site = model.get_submodule("model.layers.0.self_attn.q_proj")
    handle = attach(model, ThresholdMask(sites="model.layers.0.self_attn.q_proj"))
    R = handle.sites[0][2].R
    with torch.no_grad():
        R[0], R[1, :3] = 5e-3, -1.0
    x = torch.randn(4, 32)
    y = site(x)
    mask = torch.ones(32, 32)
    mask[0], mask[1, :3] = 0, 0
    torch.testing.assert_close(y, x @ (mask * site.weight).T)
    y.square().sum().backward()
    M = mask.clone().requires_grad_()
    (x @ (M * site.weight).T).square().sum().backward()
    torch.testing.assert_close(R.grad, M.grad)
    handle.merge()
    assert torch.equal(site.weight == 0, mask == 0)


def test_agreement() -> None:
    g, k = torch.tensor([1.0, -2.0, 3.0, 1.0, 1.0]), torch.tensor([0.5, -9.0, 0.0, -1.0, -3.0])
    torch.testing.assert_close(agreement(g, k), torch.tensor([1.0, 1.0, 1.0, 0.5, 0.25]))


def recipe(dropout: float, penalty: float = 0.0) -> Recipe:
    objectives = [TaskLoss(), MaskNorm(penalty), GradientDropout(dropout)]
    return Recipe(delta=ThresholdMask(sites="value"), objective=objectives)


def gradients(
    dropout: float, moved: bool, micro: int = 8
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """The mask gradients that reach the optimizer in one step, and the gradients away from the start."""
    run = run_of(recipe(dropout), dropout=False)
    masks = [i.tensor for i in run.handle.tensors().values() if i.tag == "mask"]
    objective = run.recipe["objective"][2]
    run.fire("prepare")
    if moved:
        with torch.no_grad():
            for R in masks:
                R.sub_(torch.rand(R.shape, generator=torch.Generator().manual_seed(1)) * 0.01)
    run.fire("before_step")
    rows = list(run.streams.data["train"][:8])
    for i in range(0, 8, micro):
        run.loss(run.collate(rows[i : i + micro]), 8.0).backward()
    away = dict(objective.__dict__.get("_away", {}))
    objective.gradients(run)
    return [R.grad for R in masks], away  # type: ignore[misc]


def test_gradient_dropout_drops_by_disagreement_and_leaves_the_rest() -> None:
    plain, _ = gradients(0.0, moved=True)
    dropped, away = gradients(1.0, moved=True)
    assert all(bool(k.any()) for k in away.values())
    g, d, k = (torch.stack(list(x)) for x in (plain, dropped, away.values()))
    kept, P, real = d != 0, agreement(g, k), g != 0
    torch.testing.assert_close(d[kept], g[kept])
    assert bool(kept[(P == 1.0) & real].all())
    unsure = (P < 1.0) & real
    assert int(unsure.sum()) > 200
    assert abs(float(kept[unsure].float().mean() - P[unsure].mean())) < 0.05
    half, _ = gradients(0.5, moved=True)
    for g, d, h in zip(plain, dropped, half, strict=True):
        torch.testing.assert_close(h, 0.5 * g + 0.5 * d)


def test_nothing_is_dropped_at_the_start_where_the_other_gradient_is_zero() -> None:
    plain, _ = gradients(0.0, moved=False)
    dropped, away = gradients(1.0, moved=False)
    assert max(float(k.abs().max()) for k in away.values()) < 1e-7
    for g, d in zip(plain, dropped, strict=True):
        assert float((g != d).float().mean()) < 0.05 and bool(g.any())


def test_gradient_dropout_does_not_depend_on_micro_batches() -> None:
    (one, a), (four, b) = gradients(1.0, True, 8), gradients(1.0, True, 2)
    for name, k in a.items():
        torch.testing.assert_close(b[name], k, rtol=1e-4, atol=1e-7)
    assert sum(int(((x != 0) != (y != 0)).sum()) for x, y in zip(one, four, strict=True)) < 5


def test_mask_norm_is_the_sum_of_norms_whatever_the_micro_batches() -> None:
    run = run_of(recipe(0.0, penalty=0.5))
    rows, part = list(run.streams.data["train"][:8]), run.recipe["objective"][1]
    masks = [i.tensor for i in run.handle.tensors().values() if i.tag == "mask"]
    for size in (8, 2):
        batches = [run.collate(rows[i : i + size]) for i in range(0, 8, size)]
        total = sum(part.loss(run, b, torch.zeros(size, 2), None, 8.0) for b in batches)  # type: ignore[attr-defined]
        torch.testing.assert_close(total, sum(R.norm() for R in masks))


def test_masks_close_while_training() -> None:
    run = start(run_of(recipe(1.0), lr=3e-3))
    R = torch.cat([t.R.detach().reshape(-1) for _, _, t in run.handle.sites if "R" in t.meta])
    assert 0.01 < float((R <= 5e-3).float().mean()) < 0.9
