"""IA3: which outputs and inputs are scaled, and that it merges into weights and biases."""

from __future__ import annotations

import pytest
import torch

from tests.models import tiny, tiny_batch
from tunewise.core.errors import UserError
from tunewise.core.handle import attach
from tunewise.delta.ia3 import InputScale


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_three_vectors_per_block(name: str) -> None:
    handle = attach(tiny(name), "ia3")
    parts = {s.name: (type(t.part).__name__, s.role) for _, s, t in handle.sites}
    assert {*parts.values()} == {("Scale", "key"), ("Scale", "value"), ("InputScale", "down")}
    widths = {r: sum(i.tensor.numel() for i in handle.tensors().values()) for r in ("all",)}
    assert widths["all"] == sum(
        (s.in_features if s.role == "down" else s.out_features) or 0 for _, s, _ in handle.sites
    )


def test_scaled_inputs_merge() -> None:
    model = tiny("llama")
    handle = attach(model, "ia3")
    with torch.no_grad():
        for p in handle.parameters():
            p.normal_(std=0.3)
    wanted = model(**tiny_batch("llama")).logits
    handle.merge()
    torch.testing.assert_close(model(**tiny_batch("llama")).logits, wanted, rtol=1e-5, atol=1e-5)


def test_a_part_of_a_fused_layer_is_refused() -> None:
    with pytest.raises(UserError, match="only a part of its rows"):
        attach(tiny("gpt2"), InputScale(sites="key"))
