"""Bottleneck adapters: the three forms, placements, starts, norms, the learned scalar, merging where it is linear."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.delta.small import attached, change_of, inputs, moved, pair
from tests.models import tiny, tiny_batch
from tunewise.core.errors import UserError
from tunewise.core.handle import attach
from tunewise.delta.adapter import InputAdapter, ParallelAdapter, SeriesAdapter
from tunewise.delta.lora import LoRA

FORMS = {SeriesAdapter: (8, 8), ParallelAdapter: (12, 8), InputAdapter: (12, 12)}


def tensors(handle: Any, site: str = "0") -> Any:
    return next(t for _, s, t in handle.sites if s.name == site)


def bottleneck(t: Any, h: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(h, t.down, t.down_bias)), t.up, t.up_bias)


@pytest.mark.parametrize("form", FORMS)
def test_the_form_is_what_its_equation_says(form: Any) -> None:
    model, handle = attached(form(size=3, scale=1.5, sites="'0'"), move=0.3)
    t, x, layer = tensors(handle), inputs(), pair()[0]
    assert (t.down.shape, t.up.shape) == ((3, FORMS[form][0]), (FORMS[form][1], 3))
    y = layer(x)
    wanted = {
        SeriesAdapter: lambda: y + 1.5 * bottleneck(t, y),
        ParallelAdapter: lambda: y + 1.5 * bottleneck(t, x),
        InputAdapter: lambda: layer(x + 1.5 * bottleneck(t, x)),
    }[form]()
    torch.testing.assert_close(model[0](x), wanted)


def test_before_an_identity_is_behind_an_identity() -> None:
    def square() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 3))
        with torch.no_grad():
            model[0].weight.copy_(torch.eye(12))
            model[0].bias.zero_()
        return model

    answers = []
    for form in (InputAdapter, SeriesAdapter):
        model = square()
        handle = attach(model, form(size=3, sites="'0'"), seed=0)
        moved(handle, 0.3)
        answers.append(model[0](inputs()))
    torch.testing.assert_close(*answers)


def test_a_parallel_adapter_without_a_function_is_lora() -> None:
    part = ParallelAdapter(size=3, scale=2 / 3, function="identity", bias=False, sites="linear")
    model, handle = attached(part, move=0.3)
    other, lora = attached(LoRA(rank=3, alpha=2.0, sites="linear"))
    with torch.no_grad():
        for name in ("0", "1"):
            tensors(lora, name).A.copy_(tensors(handle, name).down)
            tensors(lora, name).B.copy_(tensors(handle, name).up)
    torch.testing.assert_close(model(inputs()), other(inputs()))
    torch.testing.assert_close(change_of(handle), change_of(lora))


@pytest.mark.parametrize("form", FORMS)
def test_without_a_function_it_merges_exactly_and_with_one_not_at_all(form: Any) -> None:
    model, handle = attached(form(size=3, function="identity", sites="linear"), move=0.3)
    wanted = model(inputs())
    handle.merge()
    torch.testing.assert_close(model(inputs()), wanted)
    torch.testing.assert_close(model(inputs()), nn.Sequential(model[0], model[1])(inputs()))
    for options in ({"function": "relu"}, {"function": "identity", "norm": "after"}):
        _, other = attached(form(size=3, sites="linear", **options))
        with pytest.raises(UserError, match="cannot be merged"):
            other.merge()


def test_merging_a_bias_into_a_layer_without_one_is_refused() -> None:
    part = ParallelAdapter(size=3, function="identity", sites="linear")
    _, handle = attached(part, pair(bias=False), move=0.3)
    with pytest.raises(UserError, match="has no bias"):
        handle.merge()
    bare = ParallelAdapter(size=3, function="identity", sites="linear", bias=False)
    model, handle = attached(bare, pair(bias=False), move=0.3)
    wanted = model(inputs())
    handle.merge()
    torch.testing.assert_close(model(inputs()), wanted)


def test_a_learned_scale_starts_at_one_and_learns() -> None:
    model, handle = attached(ParallelAdapter(size=3, scale="learned", sites="'0'"), move=0.3)
    t, x = tensors(handle), inputs()
    with torch.no_grad():
        t.factor.fill_(0.7)
    torch.testing.assert_close(model[0](x), pair()[0](x) + 0.7 * bottleneck(t, x))
    model(x).sum().backward()
    assert t.factor.grad.abs() > 0
    _, fresh = attached(ParallelAdapter(size=3, scale="learned", sites="'0'"))
    assert tensors(fresh).factor.item() == 1.0 and fresh.trainable == 3 * 20 + 3 + 8 + 1


def test_norms_stand_before_or_after() -> None:
    x, layer = inputs(), pair()[0]
    for norm, width in (("before", 12), ("after", 8)):
        model, handle = attached(ParallelAdapter(size=3, norm=norm, sites="'0'"), move=0.3)
        t = tensors(handle)
        assert t.gain.shape == (width,)
        h = F.layer_norm(x, (12,), t.gain, t.shift) if norm == "before" else x
        y = bottleneck(t, h)
        y = y if norm == "before" else F.layer_norm(y, (8,), t.gain, t.shift)
        torch.testing.assert_close(model[0](x), layer(x) + y)


@pytest.mark.parametrize("start", ["zero", "bert"])
def test_step_zero_is_the_base_or_near_it(start: str) -> None:
    part = SeriesAdapter(size=16, start=start, sites="attention | mlp")  # type: ignore[arg-type]
    model, batch = tiny("bert"), tiny_batch("bert")
    base = model(**batch).logits
    attach(model, part, seed=0)
    far = float((model(**batch).logits - base).abs().max())
    assert part.identity == (start == "zero")
    assert far == 0.0 if part.identity else 0.0 < far < 0.1


PLACES = {
    "llama": ({"gate_proj", "up_proj"}, {"down_proj"}),
    "bloom": ({"dense_h_to_4h"}, {"dense_4h_to_h"}),
    "opt": ({"fc1"}, {"fc2"}),
}


def model_of(name: str) -> nn.Module:
    if name != "opt":
        return tiny(name)
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=24,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        word_embed_proj_dim=32,
    )
    return OPTForCausalLM(config).eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", PLACES)
def test_the_series_form_stands_where_the_library_puts_it(name: str) -> None:
    before, behind = PLACES[name]
    handle = attach(model_of(name), "llm_series_adapter(size=4)")
    found: dict[str, set[str]] = {}
    for key, site, t in handle.sites:
        found.setdefault(key, set()).add(site.name.rpartition(".")[2])
        wide = site.in_features if key == "input_adapter" else site.out_features
        assert t.down.shape == (4, wide) and t.up.shape == (wide, 4)
    assert found == {"input_adapter": before, "series_adapter": behind}
    last = attach(model_of(name), "llm_series_adapter(size=4, last=True)")
    assert {s.name.rpartition(".")[2] for _, s, _ in last.sites} == behind


@pytest.mark.parametrize("name", ["llama", "bloom", "gpt2"])
def test_the_parallel_form_adds_to_query_key_and_value(name: str) -> None:
    model, batch = tiny(name), tiny_batch(name)
    handle = attach(model, "llm_parallel_adapter(size=4)", seed=0)
    base = model(**batch).logits
    moved(handle, 0.1)
    assert (model(**batch).logits - base).abs().max() > 1e-4
    rows = sum(site.out_features for _, site, _ in handle.sites)
    assert rows == 2 * (3 * 32 if name != "llama" else 32 + 16 + 16)


def test_houlsby_trains_the_norms_and_pfeiffer_one_place_per_block() -> None:
    handle = attach(tiny("bert"), "houlsby(size=4)")
    assert {n.rpartition(".")[0].rpartition(".")[2] for n in handle.existing} == {"LayerNorm"}
    assert len(handle.sites) == 4 and not attach(tiny("bert"), "houlsby(size=4, norms=False)").existing
    assert [s.kind for _, s, _ in attach(tiny("bert"), "pfeiffer(size=4)").sites] == ["mlp", "mlp"]


def test_mam_is_a_prefix_and_a_parallel_adapter() -> None:
    handle = attach(tiny("bert"), "mam(tokens=3, size=4, hidden=8)")
    assert {(k, s.kind) for k, s, _ in handle.sites} == {("prefix", "attention"), ("parallel_adapter", "mlp")}
    model, batch = tiny("llama"), tiny_batch("llama")
    both = attach(model, "mam(tokens=3, size=4, hidden=None)", seed=0)
    moved(both, 0.1)
    whole = model(**batch).logits
    for part in ("prefix", "parallel_adapter"):
        alone = attach(tiny("llama"), both.recipe["delta"][0 if part == "prefix" else 1])
        assert {n for n in both.tensors() if f".{part}." in n} == set(alone.tensors())
        with torch.no_grad():
            for n, info in alone.tensors().items():
                info.tensor.copy_(both.tensors()[n].tensor)
        assert (alone.model(**batch).logits - whole).abs().max() > 1e-4
