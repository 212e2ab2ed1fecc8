"""The probe: calls per site, weights read past their module, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.models import NAMES, tiny, tiny_batch
from tunewise.sites import Calls, count_calls, find_sites

SILENT = [name for name in NAMES if name not in ("deberta", "albert", "mamba")]


def probe(name: str) -> Calls:
    model = tiny(name)
    with torch.no_grad():
        return count_calls(model, lambda: model(**tiny_batch(name)), find_sites(model))


@pytest.mark.parametrize("name", SILENT)
def test_every_site_is_called_once(name: str) -> None:
    calls = probe(name)
    assert set(calls.count.values()) == {1} and calls.notes() == []


def test_deberta_calls_twice() -> None:
    calls = probe("deberta")
    twice = {name.rpartition(".")[2] for name in calls.repeated}
    assert twice == {"query_proj", "key_proj"} and all(calls.count[name] == 2 for name in calls.repeated)
    assert calls.read_directly == ["deberta.encoder.rel_embeddings"] == calls.uncalled
    said = (
        "deberta.encoder.layer.*.attention.self.query_proj (2 sites, each) is called 2 times in one forward."
    )
    assert said in calls.notes()


def test_albert_repeats_its_layer() -> None:
    calls = probe("albert")
    inside = [name for name in calls.count if "albert_layers" in name]
    assert calls.repeated == list(dict.fromkeys(inside)) and not calls.uncalled
    assert any("attention.query is called 2 times" in note for note in calls.notes())


def test_mamba_reads_dt_proj_directly() -> None:
    calls = probe("mamba")
    assert calls.uncalled == calls.read_directly
    assert {name.rpartition(".")[2] for name in calls.read_directly} == {"conv1d", "dt_proj"}
    assert any("dt_proj" in note and "read directly" in note for note in calls.notes())


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.both, self.dead = (nn.Linear(2, 2) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.called.weight.dtype is x.dtype and self.dead.weight.shape[0] == 2
        return self.both(self.called(x)) @ self.read.weight.T + nn.functional.linear(
            x, weight=self.both.weight
        )


def test_read_dead_and_both() -> None:
    model = Odd()
    calls = count_calls(model, lambda: model(torch.ones(1, 2)), find_sites(model))
    assert calls.count == {"called": 1, "read": 0, "both": 1, "dead": 0}
    assert calls.read_directly == ["read", "both"] and calls.uncalled == ["read", "dead"]
    assert calls.notes() == [
        "read is not called, but its weight is read directly: only a change of the weight acts there.",
        "both is called, and its weight is also read while it is not running.",
        "dead is not called in this forward.",
    ]


def test_model_is_left_as_it_was() -> None:
    model = tiny("bert")
    batch = tiny_batch("bert")
    expected = model(**batch).logits
    found: list[torch.Tensor] = []
    count_calls(model, lambda: found.append(model(**batch).logits), find_sites(model))
    assert torch.equal(found[0], expected)

    def fail() -> None:
        model(**batch)
        raise KeyError("stop")

    with pytest.raises(KeyError):
        count_calls(model, fail, find_sites(model))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_sites_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match="no site of this model"):
        count_calls(tiny("bert"), lambda: None, find_sites(tiny("bert")))
