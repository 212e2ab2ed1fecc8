"""Contract 11: child runs share only named artefacts, and go on after a kill between and within them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from tunewise.core.errors import UserError
from tunewise.core.part import Part
from tunewise.core.recipe import Recipe
from tunewise.core.run import Run
from tunewise.delta.lora import LoRA
from tunewise.loop.single import Single

from .toys import FeatureBank, Recorder, Rounds, interrupted, rows, run_of, same_state, start


class Milestones(Recorder):
    slot: ClassVar[str] = "diagnose"


class Counter(Part):
    """A score table that goes from run to run."""

    slot: ClassVar[str] = "data"

    def after_step(self, run: Run) -> None:
        self.state["steps"] = self.state.get("steps", 0) + 1


def rounds(*extra: Part) -> Recipe:
    recipe = Recipe(delta=LoRA(2), loop=Rounds(2), diagnose=FeatureBank(10))
    for part in extra:
        recipe = recipe + part
    return recipe


def test_a_second_run_starts_from_the_artefacts_of_the_first() -> None:
    run = run_of(rounds(Counter()), steps=3)
    seen: list[dict[str, Any]] = []
    original = run.child

    def child(name: str, *args: Any, **options: Any) -> dict[str, Any]:
        given = copy.deepcopy(options["start"])
        found = original(name, *args, **options)
        seen.append({"given": given, "found": found})
        return found

    run.child = child  # type: ignore[method-assign]
    start(run)
    first, second = seen
    assert first["given"] == {}
    for name, value in first["found"]["adaptation"].items():
        assert torch.equal(second["given"]["adaptation"][name], value)
    name = next(iter(first["found"]["moments"]))
    steps = [int(s["found"]["moments"][name]["step"]) for s in seen]
    assert steps == [3, 6]  # Adam's moments went on, and the first round's were left alone
    assert [s["found"]["parts"]["data.0.Counter"] for s in seen] == [[{"steps": 3}], [{"steps": 6}]]
    assert second["found"]["stores"]["bank"]["evicted"] > first["found"]["stores"]["bank"]["evicted"]
    assert all(torch.equal(run.handle.state()[n], v) for n, v in second["found"]["adaptation"].items())


def test_artefacts_in_memory_are_not_changed_by_the_run_that_takes_them() -> None:
    run = run_of("lora(rank=2)", steps=3)
    inner = Recipe(**{**run.recipe.essential, **run.recipe.default})
    first = run.child("first", inner)
    before = copy.deepcopy(first)
    a = run.child("client_a", inner, start=first)
    for name, value in before["moments"].items():
        assert all(
            torch.equal(torch.as_tensor(first["moments"][name][k]), torch.as_tensor(v))
            for k, v in value.items()
        )
    assert not torch.equal(
        a["adaptation"][next(iter(a["adaptation"]))], before["adaptation"][next(iter(a["adaptation"]))]
    )


def test_a_child_leaves_the_parent_as_it_was() -> None:
    run = run_of("lora(rank=2) + full", steps=2)
    before = {n: v.clone() for n, v in run.handle.state().items()}
    names, state = [n for n, _ in run.model.named_parameters()], torch.get_rng_state()
    wanted = {n: p.requires_grad for n, p in run.model.named_parameters()}
    run.child("pilot", Recipe(**{**run.recipe.default, "delta": LoRA(4)}), data={"train": rows(8)})
    assert torch.equal(torch.get_rng_state(), state) and run.handle.active
    assert [n for n, _ in run.model.named_parameters()] == names
    assert {n: p.requires_grad for n, p in run.model.named_parameters()} == wanted
    assert all(torch.equal(run.handle.state()[n], v) for n, v in before.items())


@pytest.mark.parametrize(("step", "child"), [(3, "round_1"), (2, "round_2"), (1, "round_2")])
def test_rounds_go_on_after_a_kill_within_a_round(tmp_path: Path, step: int, child: str) -> None:
    def make(name: str) -> Run:
        return run_of(rounds(Counter()), tmp_path / name, steps=4, checkpoint_every=1)

    whole, cut = start(make("whole")), interrupted(lambda: make("cut"), step, child)
    assert same_state(whole, cut)
    assert same_state(whole, start(run_of(rounds(Counter()), steps=4)))  # and in memory alone


def test_a_finished_round_is_not_run_again(tmp_path: Path) -> None:
    def make() -> Run:
        return run_of(rounds(), tmp_path, steps=3)

    whole = start(make())
    again, ran = make(), []
    again.listen = lambda row: ran.append(row)
    start(again)
    assert same_state(whole, again) and not ran


def test_a_kill_between_rounds(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def make(name: str) -> Run:
        return run_of(rounds(), tmp_path / name, steps=3)

    first = make("cut")
    original = first.fire

    def fire(event: str, *args: Any) -> Any:
        if args == ("round",):
            raise Killed
        return original(event, *args)

    first.fire = fire  # type: ignore[method-assign]
    with pytest.raises(Killed):
        start(first)
    assert [p.name for p in (tmp_path / "cut" / "children").iterdir()] == ["round_1"]
    assert same_state(start(make("whole")), start(make("cut")))


def test_only_named_artefacts_cross_over() -> None:
    run = run_of("lora(rank=2)", steps=1)
    inner = Recipe(**{**run.recipe.essential, **run.recipe.default, "loop": Single()})
    with pytest.raises(UserError, match='Runs share no artefact "optimizer"'):
        run.child("a", inner, start={"optimizer": {}})
    with pytest.raises(UserError, match="has no part data.0.Counter, whose state was to be taken over"):
        run.child("b", inner, start={"parts": {"data.0.Counter": [{"steps": 3}]}})
    assert run.handle.active
