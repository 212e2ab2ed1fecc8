"""Quantized bases: LoRA works beside the layer's own product, everything else is refused; codes are never weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tunewise as tw
from tests.models import tiny, tiny_batch


def quantized(kind: str) -> nn.Module:
    """A tiny Llama whose block linears are kept as 8- or 4-bit codes."""
    import bitsandbytes as bnb

    model = tiny("llama").eval()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and "layers" in name:
            made: Any
            if kind == "8bit":
                made = bnb.nn.Linear8bitLt(
                    module.in_features, module.out_features, False, has_fp16_weights=False
                )
                made.weight = bnb.nn.Int8Params(module.weight.data.clone(), requires_grad=False)
            else:
                made = bnb.nn.Linear4bit(
                    module.in_features, module.out_features, False, compute_dtype=torch.float32
                )
                made.weight = bnb.nn.Params4bit(
                    module.weight.data.clone(), requires_grad=False, quant_type="nf4"
                )
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, made.to("cpu"))
    model.requires_grad_(False)
    with torch.no_grad():
        model(**tiny_batch("llama"))  # 4-bit weights are repacked by their first call
    return model


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_lora_on_codes_starts_at_the_base_learns_and_is_not_merged(kind: str) -> None:
    model, batch = quantized(kind), tiny_batch("llama")
    with torch.no_grad():
        before = model(**batch).logits
    handle = tw.attach(model, "lora(rank=2)")
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, before, rtol=0, atol=0)
    losses = []
    optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-2)
    for _ in range(5):
        loss = model(**{**batch, "labels": batch["input_ids"]}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.01
    with pytest.raises(tw.UserError, match="quantized"):
        handle.merge()
    handle.detach()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, before, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["bias_scale", "full", "series_adapter(sites='down')"])
def test_what_would_compute_on_codes_is_refused_in_words(method: str) -> None:
    with pytest.raises(tw.UserError, match="quantized|codes|bias"):
        tw.attach(quantized("8bit"), method)
