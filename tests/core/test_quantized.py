"""Quantized bases: deltas act beside the layer's own product, codes are never weights, merging says what it costs."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tunewise as tw
from tests.core.toy_deltas import Dense, Stretch
from tests.models import tiny, tiny_batch
from tunewise.core.delta import P
from tunewise.sites import Site, is_quantized, read_weight

bnb = pytest.importorskip("bitsandbytes")
TORCHAO = pytest.param(
    "torchao", marks=pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
)
KINDS = ["8bit", "4bit", TORCHAO]
EXACT = ["4bit", TORCHAO]  # 8-bit products of bitsandbytes round their inputs too


def codes_of(linear: nn.Linear, kind: str) -> nn.Module:
    """The same layer kept as 8- or 4-bit codes."""
    made: Any
    ins, outs = linear.in_features, linear.out_features
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_  # type: ignore[import-not-found]

        holder = nn.Sequential(linear)
        quantize_(holder, Int8WeightOnlyConfig())
        return holder[0]
    if kind == "8bit":
        made = bnb.nn.Linear8bitLt(ins, outs, False, has_fp16_weights=False)
        made.weight = bnb.nn.Int8Params(linear.weight.data.clone(), requires_grad=False)
    else:
        made = bnb.nn.Linear4bit(ins, outs, False, compute_dtype=torch.float32)
        made.weight = bnb.nn.Params4bit(linear.weight.data.clone(), requires_grad=False, quant_type="nf4")
    return made.to("cpu")  # type: ignore[no-any-return]


def quantized(kind: str) -> nn.Module:
    """A tiny Llama whose block linears are kept as codes."""
    model = tiny("llama").eval()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and "layers" in name:
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, codes_of(module, kind))
    model.requires_grad_(False)
    with torch.no_grad():
        model(**tiny_batch("llama"))  # 4-bit weights are repacked by their first call
    return model


def real(model: nn.Module) -> nn.Module:
    """The same model with the numbers that its codes stand for."""
    plain = tiny("llama").eval()
    for name, module in plain.named_modules():
        if type(module) is nn.Linear and "layers" in name:
            module.weight.data = read_weight(model.get_submodule(name)).detach().float().clone()
    return plain


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(**tiny_batch("llama")).logits  # type: ignore[no-any-return]


def moved(model: nn.Module, method: Any, name: str = "default", seed: int = 1) -> tw.Handle:
    handle = tw.attach(model, method, seed=seed, name=name)
    make = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(torch.randn(p.shape, generator=make) * 0.1)
    return handle


class Norms(Dense):
    """W' = W diag(m / |W_0|): m starts at the norms of the columns, read off the weight as anyone would."""

    def tensors(self, site: Site) -> dict[str, P]:
        return {"D": P(site.module.weight.detach().float().norm(dim=0))}

    def weight(self, t: Any, W: Tensor) -> Tensor:
        return W * (t.D / W.norm(dim=0))


class Started(Dense):
    """Its start changes the base."""

    def attached(self, adaptation: Any) -> None:
        for _, site, _ in adaptation.sites:
            adaptation.commit(site, torch.zeros(site.out_features, site.in_features))


@pytest.mark.parametrize("kind", KINDS)
def test_lora_on_codes_starts_at_the_base_learns_and_is_not_merged(kind: str) -> None:
    model, batch = quantized(kind), tiny_batch("llama")
    before = logits(model)
    handle = tw.attach(model, "lora(rank=2)")
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
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
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)


METHODS = [
    "lora(rank=2)",
    Dense("query | down"),
    Stretch("query | down"),
    Norms("query | down"),
    "series_adapter(sites='down')",
    "parallel_adapter",
    "bias_scale",
    "ladder",
    "prompt_tuning(tokens=2)",
]


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("kind", EXACT)
def test_answers_are_those_of_the_real_numbers(kind: str, method: Any) -> None:
    model = quantized(kind)
    plain = real(model)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-5)
    before = logits(model)
    moved(model, method)
    moved(plain, method)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-5)
    assert (logits(model) - before).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_change_of_nothing_is_the_layers_own_product(kind: str) -> None:
    model = quantized(kind)
    before = logits(model)
    handle = tw.attach(model, Dense("query | down"))
    assert torch.equal(logits(model), before)
    (model(**tiny_batch("llama")).logits * torch.arange(99.0)).sum().backward()
    assert all(bool(p.grad.any()) for p in handle.parameters())  # type: ignore[union-attr]
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(1e-3)
    assert not torch.equal(logits(model), before)


@pytest.mark.parametrize("method", ["full", "partial", Started()], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_what_would_write_codes_is_refused_in_words(kind: str, method: Any) -> None:
    model = quantized(kind)
    before = logits(model)
    with pytest.raises(tw.UserError, match="quantized|codes"):
        tw.attach(model, method)
    assert torch.equal(logits(model), before) and not tw.handles(model)


def gap(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm())


@pytest.mark.parametrize("method", ["lora(rank=2)", Dense("query | down")], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_merging_into_codes_reports_its_error_and_is_undone(kind: str, method: Any) -> None:
    model = quantized(kind)
    before = logits(model)
    handle = moved(model, method)
    adapted, changes = logits(model), handle.materialize()
    old = {n: read_weight(m).clone() for n, m in model.named_modules() if is_quantized(m)}
    handle.merge(quantized=True)
    assert all(is_quantized(model.get_submodule(n)) for n in old)
    errors, total, whole = handle.merge_errors, 0.0, 0.0
    assert set(errors) - {""} == set(changes) & set(old)
    for name in set(errors) - {""}:
        wanted = old[name] + changes[name]
        lost = gap(read_weight(model.get_submodule(name)), wanted)
        assert errors[name] == pytest.approx(lost / float(changes[name].norm()), rel=1e-3)
        assert 0 < errors[name] < 1
        total, whole = total + lost**2, whole + float(changes[name].norm()) ** 2
    assert errors[""] == pytest.approx((total / whole) ** 0.5, rel=1e-3)
    assert gap(logits(model), adapted) < (1.0 if kind == "4bit" else 0.2) * gap(before, adapted)
    if kind != "8bit":
        torch.testing.assert_close(
            logits(model), logits(_with_head(real(model), model)), rtol=1e-4, atol=1e-5
        )
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), logits(model))
    handle.unmerge()
    assert torch.equal(logits(model), adapted) and handle.merge_errors == {}
    for name, weight in old.items():
        assert torch.equal(read_weight(model.get_submodule(name)), weight)
    handle.merge(quantized=True)
    handle.detach()
    assert torch.equal(logits(model), before)


def _with_head(plain: nn.Module, model: Any) -> nn.Module:
    plain.lm_head.weight.data = model.lm_head.weight.data.clone()  # type: ignore[union-attr,operator]
    return plain


class Codes(bnb.nn.Params4bit):  # type: ignore[misc,name-defined]
    """A scheme of somebody else's."""


def test_a_scheme_that_cannot_be_written_is_refused() -> None:
    model = quantized("4bit")
    handle = moved(model, "lora(rank=2)")
    before = logits(model)
    handle.sites[0][1].module.weight.__class__ = Codes
    with pytest.raises(tw.UserError, match="keeps its weight as Codes, in a scheme"):
        handle.merge(quantized=True)
    assert torch.equal(logits(model), before) and handle.merged is None


@pytest.mark.parametrize("nested", [True, False])
def test_codes_that_are_packed_for_the_processor_are_read(nested: bool) -> None:
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    layer = bnb.nn.Linear4bit(128, 64, False, compute_dtype=torch.float32)
    layer.weight = bnb.nn.Params4bit(
        torch.randn(64, 128), requires_grad=False, quant_type="nf4", compress_statistics=nested
    )
    layer = layer.to("cpu")
    before, weight = read_weight(layer), layer.weight
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    torch.testing.assert_close(read_weight(layer), before, rtol=1e-2, atol=1e-6)  # scales are bfloat16 now
    assert weight.quant_state.packing_format_for_cpu


@pytest.mark.parametrize("kind", KINDS)
def test_export_to_lora_needs_no_real_base_and_hf_is_refused(kind: str, tmp_path: Path) -> None:
    from tunewise.interop.export import export
    from tunewise.interop.peft import read_peft

    model = quantized(kind)
    handle = moved(model, "lora(rank=2)")
    wanted = logits(model)
    facts = export(handle, "lora", tmp_path / "lora")
    assert facts["relative_error"] < 1e-5
    with pytest.raises(tw.UserError, match="quantized: merging would lose precision"):
        export(handle, "hf", tmp_path / "hf")
    assert not (tmp_path / "hf").exists() and torch.equal(logits(model), wanted)
    again = quantized(kind)
    read_peft(again, tmp_path / "lora")
    torch.testing.assert_close(logits(again), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", EXACT)
def test_mixes_and_rows_work_beside_codes(kind: str) -> None:
    model = quantized(kind)
    plain, batch = real(model), tiny_batch("llama", size=3)
    for one in (model, plain):
        for seed, (name, method) in enumerate({"a": "lora(rank=2)", "b": Dense("query | down")}.items()):
            moved(one, method, name, seed)
        tw.mix(one, {"a": 0.5, "b": -0.5})
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-5)
    found = []
    for one in (model, plain):
        with tw.rows(one, ["b", None, "a"]), torch.no_grad():
            found.append(one(**batch).logits)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
