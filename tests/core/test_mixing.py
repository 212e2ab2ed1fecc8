"""Several adaptations at once with weights, switching between them, and loading another one in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import tunewise as tw
from tests.core.toy_deltas import Dense, Started, Stretch
from tests.models import tiny, tiny_batch
from tunewise.core.forward import forward_of
from tunewise.core.plans import rebuild


def moved(model: nn.Module, method: Any, name: str, seed: int = 1) -> tw.Handle:
    handle = tw.attach(model, method, seed=seed, name=name)
    make = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(torch.randn(p.shape, generator=make) * 0.1)
    return handle


@torch.no_grad()
def logits(model: Any, name: str = "llama") -> Tensor:
    return model(**tiny_batch(name)).logits  # type: ignore[no-any-return]


class Cut(Dense):
    """W' = W where D > 0."""

    order: ClassVar[str] = "mask"

    def weight(self, t: Any, W: Tensor) -> Tensor:
        return W * (t.D > 0)


ADDITIVE = ["lora(rank=2)", "lora(rank=2, sites='linear | embedding')", Dense(), "ladder"]
SCALED = [*ADDITIVE, Stretch(), "series_adapter(sites='mlp')", "parallel_adapter"]


@pytest.mark.parametrize("method", SCALED, ids=str)
def test_one_is_the_adaptation_and_zero_the_base(method: Any) -> None:
    model = tiny("llama")
    base = logits(model)
    handle = moved(model, method, "a")
    whole = logits(model)
    tw.mix(model, {"a": 1})
    assert torch.equal(logits(model), whole)
    tw.mix(model, {"a": 0.0})
    assert torch.equal(logits(model), base)
    tw.mix(model, {"a": 0.5})
    half = logits(model)
    assert (half - whole).abs().max() > 1e-4 and (half - base).abs().max() > 1e-4
    handle.activate()
    assert torch.equal(logits(model), whole)


def linear(method: str, name: str = "llama", weights: tuple[float, float] = (0.7, -0.3)) -> None:
    model, plain = tiny(name), tiny(name)
    handles = {n: moved(model, method, n, seed) for n, seed in (("a", 1), ("b", 2))}
    tw.mix(model, dict(zip("ab", weights, strict=True)))
    for (_, handle), weight in zip(handles.items(), weights, strict=True):
        for key, change in handle.materialize().items():
            own = dict(plain.named_parameters())
            target = own[key if key in own else f"{key}.weight"]
            with torch.no_grad():
                target.add_(weight * (change.T if name == "gpt2" else change))
    torch.testing.assert_close(logits(model, name), logits(plain, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.3), (2.0, 0.0)])
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "mixtral"])
def test_the_mix_is_the_base_plus_the_weighted_changes(name: str, weights: tuple[float, float]) -> None:
    sites = "experts" if name == "mixtral" else "linear & ~head"
    linear(f"lora(rank=2, sites='{sites}')", name, weights)


def test_two_of_weight_one_are_both_active_bit_by_bit() -> None:
    model = tiny("llama")
    a, b = (moved(model, "lora(rank=2)", n, s) for n, s in (("a", 1), ("b", 2)))
    a.activate()
    b.activate(only=False)
    wanted = logits(model)
    b.activate()
    tw.mix(model, {"a": 1.0, "b": 1.0})
    assert torch.equal(logits(model), wanted)


def test_weights_change_again_and_others_are_switched_off() -> None:
    model = tiny("llama")
    for i, name in enumerate("abc"):
        moved(model, "lora(rank=2)", name, i)
    tw.mix(model, {"a": 0.5, "b": 0.5})
    first = logits(model)
    assert [h.active for h in tw.handles(model).values()] == [True, True, False]
    tw.mix(model, {"c": 0.1})
    assert [h.active for h in tw.handles(model).values()] == [False, False, True]
    assert not torch.equal(logits(model), first)
    tw.mix(model, {"a": 0.5, "b": 0.5})
    assert torch.equal(logits(model), first)
    with tw.handles(model)["b"].disabled():
        assert not torch.equal(logits(model), first)
    assert torch.equal(logits(model), first)


def test_gradients_are_weighted_too() -> None:
    model = tiny("llama")
    handle = moved(model, "lora(rank=2, sites='head')", "a")
    batch = tiny_batch("llama")
    found = []
    for weight in (1.0, 0.25):
        tw.mix(model, {"a": weight})
        (model(**batch).logits * torch.arange(99.0)).sum().backward()
        found.append([p.grad for p in handle.parameters()])
        for p in handle.parameters():
            p.grad = None
    for whole, quarter in zip(*found, strict=True):
        torch.testing.assert_close(quarter, 0.25 * whole)


def test_a_mix_is_neither_saved_nor_merged_and_export_gives_it_back(tmp_path: Path) -> None:
    from tunewise.interop.export import export

    model = tiny("llama")
    handle = moved(model, "lora(rank=2)", "a")
    whole, change = logits(model), handle.materialize()
    tw.mix(model, {"a": 0.5})
    mixed = logits(model)
    for key, value in handle.materialize().items():
        assert torch.equal(value, change[key])
    with pytest.raises(tw.UserError, match="end the mix"):
        handle.merge()
    export(handle, "hf", tmp_path / "hf")
    assert torch.equal(logits(model), mixed)
    handle.save(tmp_path / "saved")
    other = tiny("llama")
    tw.restore(other, tmp_path / "saved")
    assert torch.equal(logits(other), whole)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("prompt_tuning(tokens=2)", '"b" cannot be mixed: SoftPrompt adds positions'),
        ("prefix_tuning(tokens=2)", '"b" cannot be mixed: Prefix adds positions'),
        ("partial", '"b" cannot be mixed: it trains .* of the base'),
        (Cut(), '"b" cannot be mixed: a mask holds entries'),
        (Started(), '"b" cannot be mixed: its start changed .*q_proj.weight'),
    ],
    ids=str,
)
def test_what_has_no_share_is_refused_and_nothing_changes(method: Any, words: str) -> None:
    model = tiny("llama")
    moved(model, "lora(rank=2)", "a")
    moved(model, method, "b")
    before = logits(model)
    with pytest.raises(tw.UserError, match=words):
        tw.mix(model, {"a": 0.5, "b": 0.5})
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("method", [Stretch(), "series_adapter(sites='query | key')"], ids=str)
def test_changes_that_do_not_add_up_are_refused_at_one_layer_alone(method: Any) -> None:
    model = tiny("llama")
    moved(model, method, "a")
    moved(model, "lora(rank=2, sites='query')", "b")
    moved(model, "lora(rank=2, sites='down')", "c")
    with pytest.raises(tw.UserError, match='"a" and "b" cannot be mixed: both act at .*q_proj, where'):
        tw.mix(model, {"a": 0.5, "b": 0.5})
    tw.mix(model, {"a": 0.5, "c": 0.5})


def test_names_and_numbers_are_checked() -> None:
    model = tiny("llama")
    moved(model, "lora(rank=2)", "poems")
    with pytest.raises(tw.UserError, match='no adaptation called "poem".*poems'):
        tw.mix(model, {"poem": 1.0})
    with pytest.raises(tw.UserError, match="finite number"):
        tw.mix(model, {"poems": float("nan")})
    with pytest.raises(tw.UserError, match="at least one"):
        tw.mix(model, {})
    tw.handles(model)["poems"].merge()
    with pytest.raises(tw.UserError, match="merged"):
        tw.mix(model, {"poems": 1.0})


def test_switching_keeps_the_plans_that_were_compiled() -> None:
    model = tiny("llama")
    a, b = (moved(model, "lora(rank=2)", n, s) for n, s in (("a", 1), ("b", 2)))
    module = a.sites[0][1].module
    seen = []
    for handle in (a, b, a, b):
        handle.activate()
        found = forward_of(module)
        assert found is not None
        seen.append(found.plan)
    assert seen[0] is seen[2] and seen[1] is seen[3] and seen[0] is not seen[1]
    rebuild(model)
    assert forward_of(module).plan is seen[3]  # type: ignore[union-attr]


@pytest.mark.parametrize("method", ["lora(rank=2)", "prompt_tuning(tokens=2)", "partial"])
def test_load_takes_a_saved_adaptation_in_place(method: str, tmp_path: Path) -> None:
    model = tiny("llama")
    other = moved(model, method, "other", seed=2)
    wanted = logits(model)
    other.save(tmp_path)
    other.detach()
    mine = moved(model, method, "mine")
    before = mine.parameters()
    assert not torch.equal(logits(model), wanted)
    mine.load(tmp_path)
    assert torch.equal(logits(model), wanted)
    assert all(x is y for x, y in zip(before, mine.parameters(), strict=True))


def test_load_takes_another_number_of_units(tmp_path: Path) -> None:
    from tunewise.core.run import Run

    model = tiny("llama")
    other = moved(model, "lora(rank=4, sites='query')", "other")
    run = Run(other)
    for where in run.tensors.sizes():
        run.tensors.resize(where, 2)
    wanted = logits(model)
    other.save(tmp_path)
    mine = tw.attach(model, "lora(rank=4, sites='query')", name="mine")
    mine.load(tmp_path)
    mine.activate()
    assert torch.equal(logits(model), wanted)


def test_load_refuses_another_recipe_or_base_before_it_writes(tmp_path: Path) -> None:
    model = tiny("llama")
    handle = moved(model, "lora(rank=2)", "a")
    handle.save(tmp_path / "a")
    other = moved(model, "lora(rank=4)", "b")
    before = {n: v.clone() for n, v in other.state().items()}
    with pytest.raises(tw.UserError, match='other settings than "b".*tw.restore'):
        other.load(tmp_path / "a")
    with pytest.raises(tw.UserError, match="holds no adaptation"):
        other.load(tmp_path)
    lm = moved(tiny("gpt2"), "lora(rank=2, sites='head')", "a")
    lm.save(tmp_path / "gpt2")
    wide = tw.attach(_wide(), "lora(rank=2, sites='head')", name="a")
    with pytest.raises(tw.UserError, match="has another shape"):
        wide.load(tmp_path / "gpt2")
    assert all(torch.equal(v, before[n]) for n, v in other.state().items())


def _wide() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=99))


def test_load_reads_no_settings_of_training(tmp_path: Path) -> None:
    from tunewise.optim.adamw import AdamW

    model = tiny("llama")
    trained = moved(model, tw.methods.lora(rank=2) + AdamW(), "trained")
    trained.save(tmp_path)
    wanted = logits(model)
    mine = tw.attach(model, "lora(rank=2)", name="mine")
    mine.load(tmp_path)
    assert torch.equal(logits(model), wanted)
