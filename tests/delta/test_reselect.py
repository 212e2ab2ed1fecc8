"""Entries picked anew: what leaves stays in the base, what stays keeps its moments, and runs resume bit-equal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.core.toys import interrupted, run_of, same_state, start
from tests.models import tiny, tiny_batch
from tunewise.core.errors import UserError
from tunewise.core.handle import attach, restore
from tunewise.core.recipe import Recipe
from tunewise.core.run import Run
from tunewise.delta.reselect import ReselectedEntries
from tunewise.delta.select_entries import Below, Largest, Principal, Uniform

QUERY = "bert.encoder.layer.0.attention.self.query"


def lift(every: float = 2) -> Recipe:
    return Recipe(delta=ReselectedEntries(Principal(rank=2, kept=4), sites="query | value", every=every))


def sara() -> Recipe:
    part = ReselectedEntries(Below(threshold=0.02), sites="query | value", every=2, times=1, within=True)
    return Recipe(delta=part)


@pytest.mark.parametrize("recipe", [lift, sara], ids=["lift", "sara"])
@pytest.mark.parametrize("stop", [3, 5])
def test_resumes_bit_equal(recipe: Callable[[], Recipe], stop: int, tmp_path: Path) -> None:
    options = {"checkpoint_every": 1, "lr": 1e-2}
    whole = start(run_of(recipe(), tmp_path / "whole", **options))
    cut = interrupted(lambda: run_of(recipe(), tmp_path / "cut", **options), stop)
    assert whole.handle.moved and same_state(whole, cut)


def stepped(recipe: Recipe, push: float = 0.0, lr: float = 1e-3) -> tuple[Run, torch.optim.AdamW]:
    """One step of a user's own loop, then a push that makes some entries leave."""
    run = run_of(recipe)
    optimizer = torch.optim.AdamW(run.handle.parameters(), lr=lr)
    run.handle.run = run
    run.handle.watch(optimizer)
    step(run, optimizer)
    for i in run.handle.tensors().values():
        if i.owner == "reselected_entries":
            i.tensor.data.add_(torch.randn(i.tensor.shape, generator=torch.Generator().manual_seed(1)) * push)
    return run, optimizer


def step(run: Run, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    batch = run.collate(next(run.batches("train", 4)))
    run.loss(batch, float(batch.units.sum())).backward()
    optimizer.step()


def test_model_is_the_same_and_moments_follow_their_entries() -> None:
    run, optimizer = stepped(lift(), push=0.05)
    site, t = next((s, t) for _, s, t in run.handle.sites if s.name == QUERY)
    name = f"{QUERY}.reselected_entries.values"
    old, values = t.index.long().clone(), t.values.detach().clone()
    moments = optimizer.state[t.values]["exp_avg"].clone()
    ids = torch.arange(3, 11).view(1, 8)
    with torch.no_grad():
        before = run.model(input_ids=ids).logits
        base = site.module.weight.clone()
        t.part._again(run, name, site, t)
        run.tensors.settle()
        torch.testing.assert_close(run.model(input_ids=ids).logits, before, rtol=0, atol=1e-6)
    new = t.index.long()
    stay = torch.isin(new, old)
    assert 0 < int(stay.sum()) < len(new) == len(old)
    where = torch.searchsorted(old, new[stay])
    assert torch.equal(t.values[stay], values[where]) and not t.values[~stay].any()
    state = optimizer.state[t.values]
    assert torch.equal(state["exp_avg"][stay], moments[where]) and not state["exp_avg"][~stay].any()
    assert float(state["step"]) == 1.0
    left = (site.module.weight - base).reshape(-1).nonzero().view(-1)
    assert torch.equal(left, old[~torch.isin(old, new)])


def test_an_unchanged_selection_changes_nothing() -> None:
    run, optimizer = stepped(
        Recipe(delta=ReselectedEntries(Largest(number=40), sites="query", every=1)), lr=0.0
    )
    tensors = [id(p) for p in run.handle.parameters()]
    moments = [optimizer.state[p]["exp_avg"].clone() for p in run.handle.parameters()]
    run.fire("after_step")
    assert [id(p) for p in run.handle.parameters()] == tensors and not run.handle.moved
    assert all(map(torch.equal, moments, (optimizer.state[p]["exp_avg"] for p in run.handle.parameters())))


def test_selection_shrinks_within_and_only_once() -> None:
    run, optimizer = stepped(sara(), push=0.02)
    sizes = [[len(t.index) for _, _, t in run.handle.sites if t.part.slot == "delta"]]
    sets = [set(t.index.tolist()) for _, _, t in run.handle.sites if t.part.slot == "delta"]
    for _ in range(4):
        step(run, optimizer)
        sizes.append([len(t.index) for _, _, t in run.handle.sites if t.part.slot == "delta"])
    after = [set(t.index.tolist()) for _, _, t in run.handle.sites if t.part.slot == "delta"]
    assert sum(sizes[0]) > sum(sizes[1]) == sum(sizes[-1])
    assert all(a < b for a, b in zip(after, sets, strict=True))


def test_saved_after_a_change_and_detached_bit_equal(tmp_path: Path) -> None:
    run = start(run_of(lift(), lr=1e-2))
    batch = tiny_batch("bert")
    with torch.no_grad():
        wanted = run.model.eval()(**batch).logits
    other = tiny("bert")
    again = restore(other, run.handle.save(tmp_path))
    with torch.no_grad():
        assert run.handle.moved and torch.equal(other(**batch).logits, wanted)
    for model, handle in ((run.model, run.handle), (other, again)):
        handle.detach()
        for (name, a), b in zip(model.named_parameters(), tiny("bert").parameters(), strict=True):
            assert torch.equal(a, b), name


def test_a_share_needs_the_length_of_the_run() -> None:
    run = run_of(lift(every=0.5))
    with pytest.raises(UserError, match="in steps"):
        run.handle.watch(torch.optim.AdamW(run.handle.parameters()))
    assert start(run_of(lift(every=0.5), lr=1e-2)).handle.moved


def test_uniform_entries_are_drawn_anew() -> None:
    run = start(run_of(Recipe(delta=ReselectedEntries(Uniform(number=20), sites="query", every=3))))
    first = attach(tiny("bert"), ReselectedEntries(Uniform(number=20), sites="query"))
    there = {s.name: t.index for _, s, t in run.handle.sites}
    assert all(not torch.equal(t.index, there[s.name]) for _, s, t in first.sites)
