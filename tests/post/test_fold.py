"""Folding: networks and deep prompts become constants with the same answers, beside whatever else there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tunewise as tw
from tests.models import tiny, tiny_batch
from tunewise.core.errors import UserError
from tunewise.interop.export import export

FOLDED = {
    "p_tuning(tokens=3)": "SoftPrompt",
    'p_tuning(tokens=3, network="mlp", place="after_first")': "SoftPrompt",
    "multitask_prompt_tuning(tokens=3, tasks=2, task=1)": "SoftPrompt",
    "prefix_tuning(tokens=3, hidden=6)": "Prefix",
    "vpt(tokens=3)": "Prefix",
}


@torch.no_grad()
@pytest.mark.parametrize(
    "beside", ["", " + lora(rank=2)", " + prompt_tuning(tokens=2) + bitfit + vera(rank=4)"]
)
@pytest.mark.parametrize("method", FOLDED)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_constants_have_the_same_answers(name: str, method: str, beside: str, tmp_path: Path) -> None:
    if name == "llama":
        beside = beside.replace(" + bitfit", " + layernorm_tuning")
    model: Any = tiny(name)
    handle = tw.attach(model, method + beside, seed=0)
    for p in handle.parameters():
        p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.2)
    batch = tiny_batch(name)
    wanted = model(**batch).logits
    facts = export(handle, "tunewise", tmp_path / "out")
    assert len(facts["folded"]) == 1
    torch.testing.assert_close(model(**batch).logits, wanted, rtol=0, atol=0)
    again = tw.restore(other := tiny(name), tmp_path / "out")
    assert [type(p).__name__ for _, p in again.deltas][0] == FOLDED[method]
    torch.testing.assert_close(other(**batch).logits, wanted, rtol=1e-5, atol=1e-5)
    per_token = {
        "SoftPrompt": 32,
        "Prefix": sum(2 * t.K[:, 0].numel() for _, _, t in again.sites if "K" in t.meta),
    }
    mine = sum(i.tensor.numel() for i in again.tensors().values() if i.owner == again.deltas[0][0])
    assert mine == 3 * per_token[FOLDED[method]], "more than constants was written"


def test_dropout_of_the_network_is_off(tmp_path: Path) -> None:
    model: Any = tiny("llama")
    handle = tw.attach(model, "p_tuning(tokens=3, dropout=0.5)", seed=0)
    wanted = model(**tiny_batch("llama")).logits
    model.train()
    export(handle, "tunewise", tmp_path / "out")
    assert model.training and all(t.training for _, _, t in handle.sites)
    tw.restore(other := tiny("llama"), tmp_path / "out")
    torch.testing.assert_close(other(**tiny_batch("llama")).logits, wanted)


def test_a_changed_base_is_refused(tmp_path: Path) -> None:
    handle = tw.attach(tiny("bert"), "lora(rank=2)", seed=0)
    handle.merge()
    with pytest.raises(UserError, match="has changed the base"):
        export(handle, "tunewise", tmp_path / "out")
