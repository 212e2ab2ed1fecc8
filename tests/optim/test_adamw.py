"""Rates, decays and signs per tag and per tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tunewise.core.errors import UserError
from tunewise.core.handle import attach
from tunewise.core.method import read_recipe
from tunewise.core.recipe import Recipe
from tunewise.core.run import Run
from tunewise.delta.gated import GatedLowRank
from tunewise.optim.adamw import AdamW


def _run(**options: Any) -> tuple[Run, AdamW]:
    part = AdamW(**options)
    torch.manual_seed(0)
    handle = attach(
        nn.Sequential(nn.Linear(8, 6)), Recipe(delta=GatedLowRank(rank=2), optimizer=part), seed=0
    )
    run = Run(handle)
    part.setup(run, 0.01)
    return run, part


def _groups(run: Run) -> dict[str, dict[str, Any]]:
    assert run.tensors.optimizer is not None
    return {g["tag"]: g for g in run.tensors.optimizer.param_groups}


def test_a_tensor_goes_before_its_tag() -> None:
    run, _ = _run(
        rates={"direction": 2.0, "direction.B": 16.0},
        decays={"direction": 0.5, "direction.A": 0.1},
        ascend=("singular.g",),
    )
    found = _groups(run)
    assert set(found) == {"direction.A", "direction.B", "singular.g"}
    assert found["direction.A"]["lr"] == 0.02 and found["direction.B"]["lr"] == 0.16
    assert found["direction.A"]["weight_decay"] == 0.1 and found["direction.B"]["weight_decay"] == 0.5
    assert [found[n]["maximize"] for n in ("direction.A", "singular.g")] == [False, True]


def test_names_that_are_not_given_share_the_group_of_their_tag() -> None:
    run, _ = _run()
    assert {n: len(g["params"]) for n, g in _groups(run).items()} == {"direction": 2, "singular": 1}


def test_lora_plus_moves_b_by_the_ratio() -> None:
    """The first step of Adam is lr times the sign of the gradient."""
    recipe = read_recipe("lora_plus(rank=2, ratio=16)").fresh()
    model = nn.Sequential(nn.Linear(8, 6))
    handle = attach(model, recipe, seed=0)
    t: Any = handle.sites[0][2]
    with torch.no_grad():
        t.B.normal_()
    run = Run(handle)
    handle.recipe.single("optimizer").setup(run, 1e-3)  # type: ignore[union-attr]
    before = t.A.detach().clone(), t.B.detach().clone()
    model(torch.randn(5, 8)).square().sum().backward()
    assert run.tensors.optimizer is not None
    for group in run.tensors.optimizer.param_groups:
        group["weight_decay"] = 0.0
    run.tensors.optimizer.step()
    moved = [float((new - old).abs().max()) for new, old in zip((t.A, t.B), before, strict=True)]
    assert moved == pytest.approx([1e-3, 16e-3], rel=1e-3)


def test_a_tensor_that_comes_back_finds_its_own_group() -> None:
    run, _ = _run(rates={"direction.B": 16.0})
    name = next(n for n in run.tensors.all() if n.endswith(".B"))
    run.tensors.drop(name)
    assert not _groups(run)["direction.B"]["params"]
    run.tensors.add(name)
    assert _groups(run)["direction.B"]["params"] == [run.tensors.info(name).tensor]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rates": {"direction.b": 16.0}}, 'the name "direction.b"; did you mean "direction.B"'),
        ({"decays": {"driection": 1.0}}, 'did you mean "direction"'),
        ({"ascend": ("gate.g",)}, 'no tensor has the name "gate.g"'),
    ],
)
def test_names_of_nothing_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        _run(**options)
