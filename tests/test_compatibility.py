"""docs/compatibility.md is what its script finds; four forms at once are one adaptation."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import tunewise as tw
from docs import make_compatibility as made
from tunewise.sites import find_sites

BASES = made.bases()
TOGETHER = "lora(rank=2) + series_adapter(size=4) + prompt_tuning(tokens=3) + ladder(reduction=4)"


@pytest.mark.slow
def test_the_table_in_the_tree_is_current() -> None:
    assert made.FILE.read_text(encoding="utf-8") == made.render(), "run `make compatibility`"


def test_a_pair_that_is_wrong_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    restore = tw.restore

    def forgetful(model: torch.nn.Module, path: Path) -> tw.Handle:
        handle = restore(model, path)
        with torch.no_grad():
            handle.parameters()[0].zero_()
        return handle

    monkeypatch.setattr(made.tw, "restore", forgetful)
    with pytest.raises(AssertionError, match="the restored answer differs"):
        made.tried(lambda: copy.deepcopy(BASES["encoder"]), "lora(rank=4)", "bitfit")


@pytest.mark.parametrize("base", BASES)
def test_four_forms_on_one_backbone_are_one_adaptation(base: str, tmp_path: Path) -> None:
    model, other = copy.deepcopy(BASES[base]), copy.deepcopy(BASES[base])
    with torch.no_grad():
        plain = made.answer(model)
        handle = made.moved(tw.attach(model, TOGETHER, seed=0))
        wanted = made.answer(model)
        handle.save(tmp_path)
        again = tw.restore(other, tmp_path)
        assert torch.equal(made.answer(other), wanted)
        assert list(again.tensors()) == list(handle.tensors())
        kinds = {type(part).__name__ for _, part in again.deltas}
        assert kinds == {"LoRA", "SeriesAdapter", "SoftPrompt", "Ladder"}
        for key, _ in handle.deltas:  # each of the four is part of the answer
            kept = {n: i.tensor.clone() for n, i in handle.tensors().items() if i.owner == key}
            for name, value in kept.items():
                handle.tensors()[name].tensor.copy_(torch.zeros_like(value))
            assert not torch.allclose(made.answer(model), wanted, atol=1e-6), f"{key} does nothing"
            for name, value in kept.items():
                handle.tensors()[name].tensor.copy_(value)
        assert torch.equal(made.answer(model), wanted)
        handle.detach()
        assert torch.equal(made.answer(model), plain)
    assert not any("tw_" in s.name for s in find_sites(model))
