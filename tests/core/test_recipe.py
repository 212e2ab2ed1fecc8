"""The composition rule of `+`: defaults give way, list slots keep both, single slots are refused by name."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from tests.models import tiny
from tunewise.core.errors import UserError
from tunewise.core.handle import attach
from tunewise.core.method import get_method, method_names, read_recipe
from tunewise.core.part import SLOTS, Part
from tunewise.core.recipe import Recipe
from tunewise.delta.lora import LoRA
from tunewise.loop.single import Single
from tunewise.optim.adamw import AdamW


class Budget(Part):
    slot: ClassVar[str] = "allocate"
    final: int = 4


class Layers(Part):
    slot: ClassVar[str] = "allocate"


class Probe(Part):
    slot: ClassVar[str] = "diagnose"
    every: int = 1


def names(recipe: Recipe) -> dict[str, list[str]]:
    return {s: [type(p).__name__ for p in recipe[s]] for s in SLOTS if recipe[s]}


def test_slots_are_known_and_parts_fit_them() -> None:
    for options, words in [
        ({"detla": LoRA()}, 'no slot "detla"; did you mean "delta"'),
        ({"delta": Probe()}, "Probe fills the slot 'diagnose', not 'delta'"),
        ({"delta": "lora"}, "The slot delta takes parts, not str"),
        ({"allocate": [Budget(), Layers()]}, "The slot allocate holds one part, not Budget and Layers"),
    ]:
        with pytest.raises(UserError, match=words):
            Recipe(**options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match='no slot "delat"'):
        Recipe(delta=LoRA())["delat"]


def test_a_default_gives_way_to_an_essential() -> None:
    a = Recipe(delta=LoRA(), defaults={"optimizer": AdamW(clip=2.0)}, name="a")
    b = Recipe(optimizer=AdamW(clip=9.0), name="b")
    for both in (a + b, b + a):
        assert both.single("optimizer") == AdamW(clip=9.0) and names(both) == {
            "delta": ["LoRA"],
            "optimizer": ["AdamW"],
        }
    assert (a + b).name == "a + b"


def test_of_two_defaults_the_first_stays() -> None:
    a = Recipe(defaults={"optimizer": AdamW(clip=2.0), "data": []})
    b = Recipe(defaults={"optimizer": AdamW(clip=9.0), "diagnose": Probe()})
    assert (a + b).single("optimizer") == AdamW(clip=2.0) and names(a + b)["diagnose"] == ["Probe"]


def test_list_slots_keep_both_in_recipe_order() -> None:
    both = Recipe(delta=LoRA(2), diagnose=Probe(1)) + Recipe(delta=LoRA(4), diagnose=Probe(2))
    assert [p.rank for p in both["delta"]] == [2, 4]  # type: ignore[attr-defined]
    assert [p.every for p in both["diagnose"]] == [1, 2]  # type: ignore[attr-defined]
    assert [type(p).__name__ for _, p in both.parts()] == ["LoRA", "LoRA", "Probe", "Probe"]


def test_two_essentials_of_a_single_slot_are_refused_by_name() -> None:
    a, b = Recipe(delta=LoRA(), allocate=Budget(), name="adalora"), Recipe(allocate=Layers(), name="lisa")
    with pytest.raises(
        UserError,
        match=r"adalora and lisa cannot be combined: both decide the slot allocate .Budget and Layers",
    ):
        a + b
    assert (a + Recipe(allocate=Budget())).single("allocate") == Budget()  # the same part twice is one


def test_lora_and_parallel_adapter_are_both_there() -> None:
    recipe = read_recipe("lora(rank=2) + parallel_adapter")
    assert names(recipe)["delta"] == ["LoRA", "ParallelAdapter"] and recipe.lr == get_method("lora").lr
    handle = attach(tiny("llama"), recipe)
    assert {k for k, _, _ in handle.sites} == {"lora", "parallel_adapter"}


def test_two_deltas_of_one_kind_have_their_own_tensors() -> None:
    handle = attach(tiny("llama"), "lora(rank=2) + lora(rank=3, sites='query')")
    found = {n: i.tensor.shape for n, i in handle.tensors().items() if "layers.0.self_attn.q_proj" in n}
    assert [s[0] for n, s in found.items() if n.endswith("A")] == [2, 3] and len(found) == 4


def test_methods_parts_and_recipes_add_on_either_side() -> None:
    lora, adapter = get_method("lora"), get_method("parallel_adapter")
    for both in (
        lora + adapter,
        lora() + adapter,
        lora + adapter(),
        Recipe.of(LoRA()) + adapter,
        lora + Probe(),
    ):
        assert isinstance(both, Recipe) and len(both.parts()) == 2
    with pytest.raises(TypeError):
        lora() + 3  # type: ignore[operator]


def test_defaults_fill_empty_slots_only() -> None:
    recipe = Recipe(delta=LoRA(), optimizer=AdamW(clip=9.0))
    filled = recipe.with_defaults(optimizer=AdamW(), loop=Single(), head=None)
    assert filled.single("optimizer") == AdamW(clip=9.0) and "loop" in filled.default
    assert not recipe["loop"]


def test_a_fresh_recipe_has_learnt_nothing() -> None:
    recipe = Recipe(delta=LoRA(), diagnose=Probe())
    recipe["diagnose"][0].state["x"] = 1
    again = recipe.fresh()
    assert again["diagnose"][0].state == {} and recipe["diagnose"][0].state == {"x": 1}


@pytest.mark.parametrize("name", method_names())
def test_every_method_survives_its_description(name: str) -> None:
    recipe = get_method(name)()
    again = Recipe.from_description(recipe.describe())
    assert again.describe() == recipe.describe() and names(again) == names(recipe)
    assert [p for _, p in again.parts()] == [p for _, p in recipe.parts()]


def test_a_part_that_no_room_holds_must_be_imported() -> None:
    described: dict[str, Any] = Recipe(delta=LoRA()).describe()
    described["essential"]["delta"][0]["part"] = "LoRa2"
    with pytest.raises(UserError, match='No part is called "LoRa2"; did you mean "LoRA"'):
        Recipe.from_description(described)
