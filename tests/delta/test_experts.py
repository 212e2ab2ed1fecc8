"""LoRA experts: equal to a loop over experts, to plain LoRA where there is one, and to each other's special cases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.delta.box import Box
from tests.delta.small import moved
from tests.models import tiny, tiny_batch
from tunewise.core.errors import UserError
from tunewise.core.handle import Handle, attach, restore
from tunewise.core.method import read_recipe
from tunewise.delta.experts import LoRAExperts
from tunewise.delta.lora import LoRA
from tunewise.delta.routing import EntropyRoute, Route, SoftRoute, TopKRoute


def boxed(part: Any, move: float = 0.3) -> tuple[Any, Handle, Any]:
    """(a model of one layer 12 -> 7, its handle, the tensors)."""
    torch.manual_seed(0)
    model = Box(12, 7)
    handle = attach(model, part, seed=1)
    moved(handle, move)
    return model, handle, handle.sites[0][2]


def by_loop(t: Any, x: Tensor, w: Tensor, s: float) -> Tensor:
    """The published way: one expert after the other."""
    total = torch.zeros(*x.shape[:-1], t.B.shape[1])
    for i in range(len(t.A)):
        total = total + w[..., i : i + 1] * F.linear(F.linear(x, t.A[i]), t.B[i]) * s
    return total


ROUTES = [SoftRoute(), TopKRoute(2), TopKRoute(1), EntropyRoute(), EntropyRoute(0.3, 1, 0.5)]


@pytest.mark.parametrize("route", ROUTES, ids=repr)
def test_two_products_equal_the_loop(route: Route) -> None:
    model, handle, t = boxed(LoRAExperts(5, rank=3, alpha=6.0, route=route, sites="linear"))
    x = torch.randn(4, 6, 12, requires_grad=True)
    wanted = F.linear(x, model.inner.weight, model.inner.bias)
    p = F.linear(x, t.G).softmax(-1)
    wanted = wanted + by_loop(t, x, route.weights(p, (0, 1)), 2.0)
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-6)
    signs = torch.randn(wanted.shape)
    inputs = [x, *handle.parameters()]
    grads = [torch.autograd.grad((y * signs).sum(), inputs, allow_unused=True) for y in (model(x), wanted)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_chosen_few_equal_a_gather_of_them() -> None:
    model, _, t = boxed(LoRAExperts(5, rank=3, route=TopKRoute(2), sites="linear"))
    x = torch.randn(9, 12)
    p = F.linear(x, t.G).softmax(-1)
    values, best = p.topk(2)
    rows = [
        sum(v / vs.sum() * (t.B[i] @ (t.A[i] @ row)) for v, i in zip(vs, chosen, strict=True))
        for row, vs, chosen in zip(x, values, best, strict=True)
    ]
    wanted = (
        model.inner.base(x)
        if hasattr(model.inner, "base")
        else F.linear(x, model.inner.weight, model.inner.bias)
    )
    torch.testing.assert_close(model(x), wanted + 16 / 3 * torch.stack(rows), rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("route", [SoftRoute(), TopKRoute(1), EntropyRoute()], ids=repr)
def test_one_expert_is_lora(route: Route) -> None:
    model, _, t = boxed(LoRAExperts(1, rank=3, route=route, sites="linear"))
    plain, _, lora = boxed(LoRA(rank=3, sites="linear"))
    with torch.no_grad():
        lora.A.copy_(t.A[0])
        lora.B.copy_(t.B[0])
    x = torch.randn(4, 12)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-6)


def test_top_k_of_all_is_soft_and_entropy_below_nought_is_soft() -> None:
    x = torch.randn(4, 12)
    found = [
        boxed(LoRAExperts(4, route=route, sites="linear"))[0](x)
        for route in (SoftRoute(), TopKRoute(4), EntropyRoute(threshold=-1.0))
    ]
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(found[2], found[0])


def test_layers_have_numbers_of_their_own(tmp_path: Path) -> None:
    model = tiny("llama")
    handle = attach(
        model, LoRAExperts([2, 5], rank=2, route=TopKRoute([1, 3]), sites="query | value"), seed=0
    )
    assert {s.layer: t.G.shape[0] for _, s, t in handle.sites} == {0: 2, 1: 5}
    wanted = sum(n * (2 * (32 + out) + 32) for n in (2, 5) for out in (32, 16))
    assert handle.trainable == wanted == sum(t.part.formula(s) for _, s, t in handle.sites)
    heard = handle.sites[0][2].part.routings
    with heard.listening(model):
        model(**tiny_batch("llama"))
        assert [int((w > 0).sum(-1).max()) for _, w in heard.heard.values()] == [1, 1, 3, 3]
    moved(handle, 0.1)
    answer = model(**tiny_batch("llama")).logits
    handle.save(tmp_path)
    other = tiny("llama")
    restore(other, tmp_path)
    assert torch.equal(other(**tiny_batch("llama")).logits, answer)


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(UserError, match="empty list"):
        attach(tiny("llama"), LoRAExperts([]))


def test_the_router_is_float32_in_half_precision_and_under_autocast() -> None:
    model, _, t = boxed(LoRAExperts(6, rank=2, route=TopKRoute(1), sites="linear"), move=0.0)
    with torch.no_grad():
        t.G.copy_(torch.eye(6, 12) * 4 + torch.randn(6, 12) * 1e-3)
    x = torch.randn(64, 12).bfloat16().float()
    heard = t.part.routings
    found = []
    with heard.listening(model):
        model(x)
        found.append(heard.heard["inner"][0])
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
        found.append(heard.heard["inner"][0])
        model.bfloat16()(x.bfloat16())
        found.append(heard.heard["inner"][0])
    assert all(p.dtype == torch.float32 for p in found)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_dropout_is_drawn_once_for_all_experts_and_in_training_alone() -> None:
    model, _, t = boxed(LoRAExperts(3, rank=2, dropout=0.5, sites="linear"))
    x = torch.ones(2, 12)
    assert torch.equal(model.eval()(x), model(x))
    assert not torch.equal(model.train()(x), model(x))
    assert t.training


def test_it_cannot_be_merged_and_says_so() -> None:
    _, handle, _ = boxed(LoRAExperts(sites="linear"))
    with pytest.raises(UserError, match="LoRAExperts cannot be merged"):
        handle.merge()


def test_ranks_can_be_taken_away_and_the_rest_stays() -> None:
    model, handle, t = boxed(LoRAExperts(3, rank=4, sites="linear"))
    from tunewise.core.run import Run

    run = Run(handle)
    with torch.no_grad():
        t.A[:, 2:] = 0.0
    x = torch.randn(5, 12)
    wanted = model(x)
    (where,) = run.tensors.sizes()
    run.tensors.resize(where, 2)
    assert t.A.shape == (3, 2, 12) and t.B.shape == (3, 7, 2)
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "experts"),
    [("mola", [2, 4, 6, 8]), ("mola(experts=5)", [5] * 4), ("dynmole", [8] * 4), ("loramoe", [8] * 4)],
)
def test_methods_have_the_published_counts(text: str, experts: list[int]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2
    )
    handle = attach(LlamaForCausalLM(config), read_recipe(text))
    counts = {s.layer: t.G.shape[0] for _, s, t in handle.sites}
    assert [counts[i] for i in range(4)] == experts
    roles = {s.role for _, s, _ in handle.sites}
    assert ("query" in roles) is (text != "loramoe") and {"gate", "up", "down"} <= roles
