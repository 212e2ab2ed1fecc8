"""Contracts 5 and 7: only the optimizer slot holds the optimizer; others ask `run.tensors`, and moments move along."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from tunewise.core.errors import UserError
from tunewise.core.handle import attach
from tunewise.core.method import get_method
from tunewise.core.part import Part
from tunewise.core.recipe import Recipe
from tunewise.core.run import Run
from tunewise.delta.lora import LoRA
from tunewise.optim.adamw import AdamW

from .toys import HalveRanks, interrupted, run_of, same_state, start

WHERE = "bert.encoder.layer.0.attention.self.query.lora"


def halving() -> Recipe:
    return Recipe(delta=LoRA(4, sites="query | value"), allocate=HalveRanks())


def test_a_toy_allocator_is_short() -> None:
    assert len(inspect.getsource(HalveRanks).splitlines()) < 40


def test_a_toy_allocator_halves_all_ranks() -> None:
    run = start(run_of(halving()))
    assert set(run.tensors.sizes().values()) == {2}
    assert run.handle.trainable == 2 * (32 + 32) * 4
    optimizer = run.tensors.optimizer
    assert optimizer is not None
    live = {id(i.tensor) for _, i in run.tensors.active()}
    assert (
        {id(p) for g in optimizer.param_groups for p in g["params"]}
        == live
        == {id(p) for p in optimizer.state}
    )
    assert all(s["exp_avg"].shape == p.shape and s["step"] == 6 for p, s in optimizer.state.items())


@pytest.mark.parametrize("stop", [3, 5], ids=["in its interval", "after resizing"])
def test_a_toy_allocator_resumes_bit_equal(tmp_path: Path, stop: int) -> None:
    whole = start(run_of(halving(), tmp_path / "whole", checkpoint_every=1))
    cut = interrupted(lambda: run_of(halving(), tmp_path / "cut", checkpoint_every=1), stop)
    assert same_state(whole, cut) and set(cut.tensors.sizes().values()) == {2}


def follow(run: Run, where: str, steps: int, keep: torch.Tensor | None) -> None:
    """AdamW steps on given gradients; `keep` picks the units that are still there."""
    optimizer = run.tensors.optimizer
    assert optimizer is not None
    for step in range(steps):
        make = torch.Generator().manual_seed(step)
        for name, axis in (("A", 0), ("B", 1)):
            tensor = run.tensors.info(f"{where}.{name}").tensor
            full = torch.randn(*((4, 32) if axis == 0 else (32, 4)), generator=make)
            tensor.grad = full if keep is None else full.index_select(axis, keep)
        optimizer.step()


def prepared(carry: bool = True) -> tuple[Run, Run, torch.Tensor]:
    whole, cut = run_of("lora(rank=4)"), run_of("lora(rank=4)")
    keep = torch.tensor([0, 2, 3])
    for run in (whole, cut):
        run.recipe.single("optimizer").setup(run, 1e-2)  # type: ignore[union-attr]
        follow(run, WHERE, 3, None)
    if carry:
        cut.tensors.resize(WHERE, 3, keep=keep)
    else:  # what happens without the core's help: shapes fit and the moments are gone
        optimizer = cut.tensors.optimizer
        cut.tensors.resize(WHERE, 3, keep=keep)
        optimizer.state.clear()  # type: ignore[union-attr]
    follow(whole, WHERE, 10, None)
    follow(cut, WHERE, 10, keep)
    return whole, cut, keep


def test_moments_move_with_the_units_that_survive() -> None:
    for carry in (True, False):
        whole, cut, keep = prepared(carry)
        for name, axis in (("A", 0), ("B", 1)):
            a, b = (r.tensors.info(f"{WHERE}.{name}").tensor for r in (whole, cut))
            gap = float((a.index_select(axis, keep) - b).detach().abs().max())
            assert gap < 1.5e-8 if carry else gap > 1e-3


def test_growing_adds_units_that_start_fresh_and_change_nothing() -> None:
    run = start(run_of("lora(rank=4)"))
    before = {n: i.tensor.detach().clone() for n, i in run.tensors.active()}
    run.tensors.resize(WHERE, 6)
    a, b = (run.tensors.info(f"{WHERE}.{n}").tensor for n in ("A", "B"))
    assert torch.equal(a[:4], before[f"{WHERE}.A"]) and torch.equal(b[:, :4], before[f"{WHERE}.B"])
    assert a[4:].abs().min() > 0 and not b[:, 4:].any()
    state = run.tensors.optimizer.state[a]  # type: ignore[union-attr]
    assert state["exp_avg"].shape == (6, 32) and not state["exp_avg"][4:].any() and state["exp_avg"][:4].any()


def test_sizes_of_root_deltas_can_be_resized_too() -> None:
    run = run_of("prompt_tuning(tokens=4)")
    (where,) = run.tensors.sizes()
    run.tensors.resize(where, 2)
    assert run.tensors.sizes() == {where: 2}


class Script(Part):
    """Asks for something inside step 2 and notes that it did not act before the step was over."""

    slot: ClassVar[str] = "allocate"
    ask: str = "freeze"

    def gradients(self, run: Run) -> None:
        if run.step != 2:
            return
        name, tensors = f"{WHERE}.A", run.tensors
        before = tensors.info(name).tensor.detach().clone()
        requests: dict[str, Callable[[], None]] = {
            "freeze": lambda: tensors.freeze(name),
            "forget": lambda: tensors.freeze(name, forget=True),
            "drop": lambda: tensors.drop(name),
            "replace": lambda: tensors.replace(name, lambda v: v * 0.5),
            "reset": lambda: tensors.reset(name, torch.tensor([1]), axis=0),
        }
        requests[self.ask]()
        now = tensors.info(name).tensor
        assert torch.equal(before, now) and now.requires_grad and now.grad is not None
        assert not tensors.frozen and not tensors.dropped
        self.state["asked"] = True

    def after_step(self, run: Run) -> None:
        if run.step == 5:
            run.tensors.add(f"{WHERE}.A") if self.ask == "drop" else run.tensors.thaw(f"{WHERE}.A")


@pytest.mark.parametrize("ask", ["freeze", "forget", "drop", "replace", "reset"])
def test_requests_inside_a_step_act_after_it_and_are_checkpointed(tmp_path: Path, ask: str) -> None:
    def make(name: str) -> Run:
        recipe = Recipe(delta=LoRA(4, sites="query"), allocate=Script(ask))
        return run_of(recipe, tmp_path / name, checkpoint_every=1, steps=7)

    whole, cut = start(make("whole")), interrupted(lambda: make("cut"), 4)
    assert whole.recipe["allocate"][0].state["asked"]
    assert same_state(whole, cut)
    plain = start(run_of("lora(rank=4, sites='query')", steps=7))
    assert not same_state(whole, plain)
    steps = {n: int(s["step"]) for n, s in whole.recipe.single("optimizer").state_dict(whole).items()}  # type: ignore[union-attr]
    assert steps[f"{WHERE}.A"] == {"freeze": 5, "forget": 2, "drop": 2, "replace": 7, "reset": 7}[ask]
    assert steps[f"{WHERE}.B"] == 7


def test_frozen_tensors_stand_still() -> None:
    run = run_of("lora(rank=2)")
    run.tensors.freeze(f"{WHERE}.A")
    value = run.tensors.info(f"{WHERE}.A").tensor.clone()
    start(run)
    assert torch.equal(run.tensors.info(f"{WHERE}.A").tensor, value)
    assert f"{WHERE}.A" not in dict(run.tensors.active()) and f"{WHERE}.A" in run.tensors.all()


def test_wrong_names_are_answered_with_near_ones() -> None:
    run = run_of("lora(rank=2)")
    with pytest.raises(UserError, match="no trainable tensor .* did you mean"):
        run.tensors.freeze(f"{WHERE}.a")
    with pytest.raises(UserError, match="nothing to resize"):
        run.tensors.resize("bert.encoder", 1)


class Commit(Part):
    """Moves the change of one site into the base weight in mid-run (ReLoRA), and starts anew."""

    slot: ClassVar[str] = "allocate"

    def after_step(self, run: Run) -> None:
        if run.step == 3:
            for _, site, t in run.handle.sites:
                with torch.no_grad():
                    run.handle.commit(site, t.part.weight(t, torch.zeros(t.B.shape[0], t.A.shape[1])))
                run.tensors.reset(f"{site.name}.lora.B", torch.arange(t.B.shape[1]), axis=1)


def test_base_weights_that_move_in_mid_run_are_part_of_the_checkpoint(tmp_path: Path) -> None:
    def make(name: str) -> Run:
        return run_of(Recipe(delta=LoRA(2), allocate=Commit()), tmp_path / name, checkpoint_every=2)

    whole, cut = start(make("whole")), interrupted(lambda: make("cut"), 5)
    assert any(n.startswith("commit.") for n in whole.handle.state()) and same_state(whole, cut)
    batch = whole.collate(next(whole.batches("valid", 4)))
    assert torch.equal(whole.model.eval()(**batch.inputs).logits, cut.model.eval()(**batch.inputs).logits)
    base = run_of("lora")
    base.handle.detach()
    cut.handle.detach()
    assert all(
        torch.equal(a, b) for a, b in zip(cut.model.parameters(), base.model.parameters(), strict=True)
    )


def test_base_weights_that_were_written_go_and_come_with_the_adaptation() -> None:
    run = start(run_of(Recipe(delta=LoRA(2), allocate=Commit())))
    handle, batch = run.handle, run.collate(next(run.batches("valid", 4)))
    run.model.eval()

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return run.model(**batch.inputs).logits  # type: ignore[no-any-return]

    tuned, saved, base = logits(), {n: v.clone() for n, v in handle.state().items()}, run_of("lora")
    base.handle.detach()
    with torch.no_grad():
        untouched = base.model.eval()(**batch.inputs).logits
    assert not torch.equal(tuned, untouched)
    with handle.disabled():
        assert torch.equal(logits(), untouched)
        assert all(torch.equal(saved[n], v) for n, v in handle.state().items())
        site = handle.sites[0][1]
        with pytest.raises(UserError, match=f"is switched off, so it cannot write {site.name}.weight"):
            handle.commit(site, torch.ones(1))
        other = attach(run.model, Recipe(delta=LoRA(2, sites=site.name)), name="other")
        other.commit(other.sites[0][1], torch.ones(other.sites[0][1].module.weight.shape))
        other.deactivate()
        assert torch.equal(logits(), untouched)
    assert torch.equal(logits(), tuned)
    with pytest.raises(UserError, match=f"{site.name}.weight is written by another active"):
        other.activate(only=False)
    handle.detach()
    assert torch.equal(logits(), untouched)


def tagged(**options: Any) -> dict[str, Any]:
    run = run_of(
        Recipe(delta=LoRA(2), optimizer=AdamW(clip=0.0, **options)) + get_method("bias_scale")(),
        steps=1,
        warmup=0.0,
    )
    before = {n: i.tensor.detach().clone() for n, i in run.tensors.active()}
    start(run)
    return {n: (i.tag, i.tensor.detach() - before[n]) for n, i in run.tensors.active()}


def test_rates_decay_and_sign_are_set_per_tag() -> None:
    plain = tagged(decay=0.0)
    fast = tagged(decay=0.0, rates={"direction": 3.0, "bias": 0.0}, ascend=("scale",))
    assert {tag for tag, _ in plain.values()} == {"direction", "scale", "bias"}
    for name, (tag, change) in plain.items():
        factor = {"direction": 3.0, "bias": 0.0, "scale": -1.0}[tag]
        torch.testing.assert_close(fast[name][1], factor * change, rtol=1e-3, atol=1e-7)
    decayed = tagged(decay=0.0, decays={"direction": 0.5})
    moved = {t for n, (t, change) in decayed.items() if not torch.allclose(change, plain[n][1], atol=1e-6)}
    assert moved == {"direction"}


def test_an_unknown_tag_is_refused() -> None:
    with pytest.raises(UserError, match='no tensor has the tag "directon"; did you mean "direction"'):
        tagged(rates={"directon": 2.0})
