"""Contract 15: what a part needs and gives is checked before anything is loaded; refusals name the way out."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from tests.models import tiny, tiny_batch
from tunewise.core.compat import NEEDS, check, facts
from tunewise.core.errors import UserError
from tunewise.core.handle import attach
from tunewise.core.method import read_recipe
from tunewise.core.part import Part
from tunewise.core.recipe import Recipe
from tunewise.delta.lora import LoRA


class ZerothOrder(Part):
    slot: ClassVar[str] = "optimizer"
    gives: ClassVar[frozenset[str]] = frozenset({"zeroth_order"})


def needing(*needs: str, slot_name: str = "diagnose") -> Part:
    class Needing(Part):
        slot: ClassVar[str] = slot_name

    Needing.needs = frozenset(needs)
    return Needing()


@pytest.mark.parametrize(
    ("method", "gives", "lacks"),
    [
        ("lora", {"mergeable", "components", "sizes", "backprop", "second_order"}, {"frozen_backbone"}),
        ("full", {"mergeable", "backprop"}, {"components", "sizes"}),
        ("bias_scale", {"mergeable"}, {"components"}),
        ("series_adapter", {"backprop"}, {"mergeable", "components"}),
        ("lora + series_adapter", {"components"}, {"mergeable"}),
        ("ladder", {"frozen_backbone"}, {"mergeable"}),
        ("lora + ladder", set(), {"frozen_backbone_"}),
        ("prompt_tuning", set(), {"mergeable", "frozen_backbone"}),
        ("prefix_tuning", set(), {"mergeable"}),
    ],
)
def test_facts_follow_from_the_equations(method: str, gives: set[str], lacks: set[str]) -> None:
    found = facts(read_recipe(method))
    assert gives <= found and not lacks & found


def test_a_zeroth_order_optimizer_gives_no_gradients() -> None:
    found = facts(read_recipe("lora") + ZerothOrder())
    assert not {"backprop", "second_order", "per_sample"} & found


@pytest.mark.parametrize(
    ("recipe", "need", "words"),
    [
        (
            "series_adapter",
            "mergeable",
            "needs a mergeable delta, which SeriesAdapter does not give; the nearest possible recipe uses lora",
        ),
        (
            "full",
            "components",
            "needs a delta with components .low rank., which ExistingWeights does not give; .* uses lora",
        ),
        (
            "prompt_tuning",
            "sizes",
            "needs a delta whose size can change, .* the nearest possible recipe uses lora",
        ),
        (
            "zeroth",
            "backprop",
            "needs gradients from backpropagation, which ZerothOrder does not give; .* the default optimizer",
        ),
        ("lora", "frozen_backbone", "needs a backbone without backward pass, .* uses a side network"),
    ],
)
def test_an_impossible_recipe_is_refused_with_the_nearest_possible_one(
    recipe: str, need: str, words: str
) -> None:
    base = read_recipe("lora") + ZerothOrder() if recipe == "zeroth" else read_recipe(recipe)
    with pytest.raises(UserError, match=words) as caught:
        check(base + needing(need))
    assert str(caught.value).count(". ") == 0 and "Needing (diagnose)" in str(caught.value)


def test_every_known_need_can_be_refused_in_words() -> None:
    for need, (what, instead) in NEEDS.items():
        assert what and instead
        with pytest.raises(UserError, match=f"needs {what}"[:20]):
            check(read_recipe("prompt_tuning") + ZerothOrder() + needing(need))


def test_the_nearest_possible_recipe_is_possible() -> None:
    for need in ("mergeable", "components", "sizes", "internals"):
        check(read_recipe("lora") + needing(need))
    check(read_recipe("ladder") + needing("frozen_backbone"))


def test_a_recipe_that_trains_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"Needing trains nothing: add a delta, for example Needing \+ lora"):
        check(Recipe.of(needing("backprop")))


def test_it_is_checked_before_a_tensor_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("a tensor was made")

    monkeypatch.setattr(LoRA, "tensors", never)
    model = tiny("llama")
    with pytest.raises(UserError, match="mergeable"):
        attach(model, read_recipe("lora + series_adapter") + needing("mergeable"))
    assert not any("tw_" in n for n, _ in model.named_modules())


class DataParallel(nn.Module):
    """Named like torch's, whose replicas would run the original's forward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_wrapped_models_are_refused_by_name() -> None:
    with pytest.raises(
        UserError, match="wrapped in DataParallel: attach to the plain model first, then wrap it"
    ):
        attach(DataParallel(tiny("llama")), "lora")


def test_a_refused_attach_leaves_no_trace() -> None:
    model = tiny("llama")
    before = [n for n, _ in model.named_parameters()], [p.requires_grad for p in model.parameters()]
    for method in ("lora(sites='qeury')", "lora + ladder(sites='layers')", "lora + lora(sites='conv')"):
        with pytest.raises(UserError):
            attach(model, method)
        assert before == (
            [n for n, _ in model.named_parameters()],
            [p.requires_grad for p in model.parameters()],
        )
    first = attach(model, "lora")
    with pytest.raises(UserError):
        attach(model, "lora + lora(sites='conv')", name="second")
    assert first.active


def test_names_that_begin_alike_are_told_apart() -> None:
    model = tiny("llama")
    first, second = attach(model, "lora", name="a"), attach(model, "lora", name="a_b")
    first.detach()
    assert len([n for n, _ in model.named_modules() if "tw_a_b_lora" in n]) == len(second.sites)
    second.detach()


def test_a_ladder_lets_the_gradients_of_other_deltas_through() -> None:
    model, batch = tiny("llama"), tiny_batch("llama")
    handle = attach(model, "lora(rank=2) + ladder")
    with torch.no_grad():
        for info in handle.tensors().values():
            info.tensor.add_(0.01)
    model(**{**batch, "labels": batch["input_ids"]}).loss.backward()
    for name, info in handle.tensors().items():
        assert info.tensor.grad is not None and bool(info.tensor.grad.abs().sum() > 0), name
        if info.tag == "gate":
            assert bool((info.tensor.grad != 0).all()), name
