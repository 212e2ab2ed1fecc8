"""One-shot ranks: importance against the explicit formula, exact numbers of sites, moments and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.core.toys import interrupted, run_of, same_state, start
from tests.delta.small import attached
from tunewise.allocate.one_shot import OneShotRanks
from tunewise.core.errors import UserError
from tunewise.core.recipe import Recipe
from tunewise.core.run import Run
from tunewise.delta.lora import LoRA
from tunewise.delta.vera import VeRA
from tunewise.init.base import site_weight


def recipe(rank: int = 8, **options: Any) -> Recipe:
    return Recipe(delta=LoRA(rank=rank, sites="query | value"), allocate=OneShotRanks(**options))


def allocated(**options: Any) -> Run:
    run = run_of(recipe(**options), dropout=False)
    run.fire("prepare")
    return run


@pytest.mark.parametrize(("fraction", "low"), [(0.0, 0), (0.3, 1), (0.5, 2), (0.99, 3), (1.0, 4)])
def test_exactly_the_floor_of_the_fraction_gets_the_low_rank(fraction: float, low: int) -> None:
    run = allocated(fraction=fraction)
    ranks = list(run.tensors.sizes().values())
    assert sorted(ranks) == [4] * low + [8] * (4 - low)
    assert run.recipe["allocate"][0].state["ranks"] == run.tensors.sizes()


@pytest.mark.parametrize("score", ["taylor", "fisher"])
def test_importance_is_the_explicit_one_and_orders_the_ranks(score: str) -> None:
    run = allocated(fraction=0.5, score=score)
    part: Any = run.recipe["allocate"][0]
    again = run_of(recipe(), dropout=False)
    wanted: dict[str, float] = dict.fromkeys(part.state["scores"], 0.0)
    stream = again.batches("calibration", 8)
    for _ in range(3):
        batch = again.collate(next(stream))
        again.loss(batch, float(batch.units.sum())).backward()
        for key, site, t in again.handle.sites:
            change = t.B.grad @ t.A.detach() * (site_weight(site) if score == "taylor" else 1)
            wanted[f"{site.name}.{key}"] += float(change.square().mean()) / 3
            t.B.grad = t.A.grad = None
    assert part.state["scores"] == pytest.approx(wanted, rel=1e-4)
    lowest = sorted(wanted, key=wanted.__getitem__)[:2]
    assert {n for n, r in run.tensors.sizes().items() if r == 4} == {*lowest}


def test_nothing_is_trained_or_left_behind_by_the_pass() -> None:
    run = run_of(recipe(fraction=0.0))
    before = {n: v.clone() for n, v in run.handle.state().items()}
    state, mode = torch.get_rng_state(), run.model.training
    run.fire("prepare")
    assert all(torch.equal(v, before[n]) for n, v in run.handle.state().items())
    assert all(p.grad is None for p in run.model.parameters())
    assert torch.equal(torch.get_rng_state(), state) and run.model.training == mode


def test_trained_stopped_and_resumed_with_two_ranks(tmp_path: Path) -> None:
    whole = start(run_of(recipe(fraction=0.5), tmp_path / "whole", checkpoint_every=2))
    parts = interrupted(lambda: run_of(recipe(fraction=0.5), tmp_path / "parts", checkpoint_every=2), 3)
    assert same_state(whole, parts)
    assert sorted(whole.tensors.sizes().values()) == [4, 4, 8, 8]


def test_small_ranks_never_vanish() -> None:
    assert set(allocated(rank=2, fraction=1.0).tensors.sizes().values()) == {1}


def test_what_cannot_be_allocated_is_refused() -> None:
    with pytest.raises(UserError, match="low=9"):
        allocated(low=9, fraction=1.0)
    with pytest.raises(UserError, match="size can change"):
        attached(Recipe(delta=VeRA(), allocate=OneShotRanks()))
    _, handle = attached(Recipe(delta=LoRA(), allocate=OneShotRanks()))
    with pytest.raises(UserError, match="no rows"):
        Run(handle).fire("prepare")
