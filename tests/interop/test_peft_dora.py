"""DoRA against PEFT's: the same tensors give the same logits and gradients."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from tests.models import tiny, tiny_batch
from tunewise.core.handle import Handle, attach
from tunewise.delta.dora import DoRA

peft = pytest.importorskip("peft")

CASES = {
    "bert": ["query", "dense"],
    "llama": ["q_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "embedding": ["embed_tokens"],
}


def _layers(theirs: Any) -> dict[str, Any]:
    return {n.removeprefix("base_model.model."): m for n, m in theirs.named_modules() if hasattr(m, "lora_A")}


def _pair(case: str, dropout: float) -> tuple[nn.Module, Handle, Any]:
    """Ours with PEFT's tensors, and PEFT's, both moved from their start."""
    targets = CASES[case]
    name = "llama" if case == "embedding" else case
    options = {"fan_in_fan_out": True} if name == "gpt2" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(
            r=3, lora_alpha=5, use_dora=True, lora_dropout=dropout, target_modules=targets, **options
        )
        theirs = peft.get_peft_model(tiny(name), config)
    make = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=make) * 0.1)
    layers = _layers(theirs)
    model = tiny(name)
    pattern = "|".join(n.replace(".", r"\.") for n in layers)
    handle = attach(model, DoRA(rank=3, alpha=5.0, dropout=dropout, sites=f"re:^({pattern})$"))
    assert {s.name for _, s, _ in handle.sites} == layers.keys()
    with torch.no_grad():
        for _, site, t in handle.sites:
            for mine, other in _tensors(t, layers[site.name]):
                mine.copy_(other)
    return model, handle, theirs


def _tensors(t: Any, layer: Any) -> list[tuple[Any, Any]]:
    """(ours, PEFT's) of one site."""
    m = layer.lora_magnitude_vector["default"].weight
    if t.kind == "embedding":
        return [
            (t.A, layer.lora_embedding_A["default"]),
            (t.B, layer.lora_embedding_B["default"]),
            (t.m, m),
        ]
    return [(t.A, layer.lora_A["default"].weight), (t.B, layer.lora_B["default"].weight), (t.m, m)]


@pytest.mark.parametrize("length", [3, 40])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_pefts(case: str, dropout: float, length: int) -> None:
    """With dropout in evaluation, where both are without; in training the masks are not the same ones."""
    model, handle, theirs = _pair(case, dropout)
    batch = tiny_batch("llama" if case == "embedding" else case, length=length)
    results = []
    for one in (model.eval(), theirs.eval()):
        outputs = one(**batch)
        outputs.loss.backward()
        results.append(outputs.logits.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    layers = _layers(theirs)
    for place, site, t in handle.sites:
        for mine, other in _tensors(t, layers[site.name]):
            torch.testing.assert_close(
                mine.grad, other.grad, rtol=1e-5, atol=1e-5, msg=f"{place} {site.name}"
            )


def test_starts_are_the_same() -> None:
    model, other = tiny("bert"), tiny("bert")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(other, peft.LoraConfig(r=3, use_dora=True, target_modules=["query"]))
    handle = attach(model, DoRA(rank=3, sites="query"))
    layers = _layers(theirs)
    for _, site, t in handle.sites:
        torch.testing.assert_close(t.m, layers[site.name].lora_magnitude_vector["default"].weight)
        assert t.A.shape == layers[site.name].lora_A["default"].weight.shape
