"""W' = W + scatter(values): what is trained, what the fused product gives, what the optimizer holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.models import tiny, tiny_batch
from tunewise.core.errors import RunError, UserError
from tunewise.core.handle import Handle, attach
from tunewise.delta.entries import FewEntries, SparseEntries, SparseLinear
from tunewise.delta.select_entries import Below, Largest, Uniform

QUERY = "model.layers.0.self_attn.q_proj"


def sparse(model: nn.Module, part: SparseEntries, **options: Any) -> Handle:
    return attach(model, part, **options)


@torch.no_grad()
def moved(handle: Handle) -> Handle:
    make = torch.Generator().manual_seed(3)
    for p in handle.parameters():
        p.add_(torch.randn(p.shape, generator=make) * 0.1)
    return handle


def test_only_selected_entries_change() -> None:
    model = tiny("llama")
    handle = moved(sparse(model, SparseEntries(Below(threshold=0.01))))
    for site, change in handle.materialize().items():
        W = model.get_submodule(site).weight
        assert bool((change != 0).eq(W.abs() < 0.01).all())


@pytest.mark.parametrize("part", [SparseEntries, FewEntries])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forms_agree_in_value_and_gradient(part: type[SparseEntries], dtype: torch.dtype) -> None:
    batch, found = tiny_batch("llama"), []
    for plain in (True, False):
        model = tiny("llama").to(dtype)
        handle = moved(sparse(model, part(Uniform(number=40), scale=2.0), plain=plain))
        out = model(**batch)
        out.loss.backward()
        found.append((out.logits.detach(), torch.cat([p.grad for p in handle.parameters()])))  # type: ignore[misc]
    tight = dtype == torch.float32
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if tight else 0.05, atol=1e-6 if tight else 0.02)
    assert found[0][1].abs().max() > 1e-4


def test_fused_product_keeps_no_changed_weight() -> None:
    model = tiny("llama")
    moved(sparse(model, SparseEntries(Uniform(share=0.05), sites=QUERY)))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        y = model.get_submodule(QUERY)(torch.randn(3, 32, requires_grad=True))
    W = model.get_submodule(QUERY).weight
    assert y.requires_grad and any(k.data_ptr() == W.data_ptr() for k in kept)
    assert not any(k.shape == W.shape and k.data_ptr() != W.data_ptr() for k in kept)


def test_fused_product_gives_a_trained_bias_its_gradient_and_refuses_a_second_derivative() -> None:
    x, W, b = torch.randn(2, 5, 4, requires_grad=True), torch.randn(3, 4), torch.zeros(3, requires_grad=True)
    v, index = torch.randn(2, requires_grad=True), torch.tensor([1, 7], dtype=torch.int32)
    y = SparseLinear.apply(x, W, b, v, index)
    dense = W.reshape(-1).index_add(0, index, v).view(3, 4)
    wanted = torch.autograd.grad(F.linear(x, dense, b).square().sum(), (x, b, v))
    for a, g in zip(torch.autograd.grad(y.square().sum(), (x, b, v)), wanted, strict=True):
        torch.testing.assert_close(a, g)
    with pytest.raises(RunError, match="plain=True"):
        torch.autograd.grad(SparseLinear.apply(x, W, b, v, index).sum(), v, create_graph=True)


def test_all_entries_train_as_the_dense_weight_does() -> None:
    batch, found = tiny_batch("llama"), []
    for method in (SparseEntries(Uniform(share=1.0), sites=QUERY), f"partial(sites='{QUERY}')"):
        model = tiny("llama")
        handle = attach(model, method)
        optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-2, weight_decay=0.0)
        for _ in range(3):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        (change,) = handle.materialize().values()
        found.append(change)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_optimizer_state_is_as_long_as_the_selection() -> None:
    model = tiny("llama")
    handle = sparse(model, SparseEntries(Uniform(number=7)))
    optimizer = torch.optim.AdamW(handle.parameters())
    model(**tiny_batch("llama")).loss.backward()
    optimizer.step()
    held = sum(v.numel() for s in optimizer.state.values() for k, v in s.items() if k != "step")
    assert held == 2 * handle.trainable == 2 * 7 * 14


def test_fused_rows_experts_and_embeddings_are_seen_in_their_own_shape() -> None:
    gpt2 = moved(sparse(tiny("gpt2"), SparseEntries(Uniform(share=0.5), sites="query")))
    for change in gpt2.materialize().values():
        assert change[:32].any() and not change[32:].any()
    mixtral = tiny("mixtral")
    handle = sparse(mixtral, SparseEntries(Largest(number=5), sites="experts"))
    assert all(t.index.numel() == 5 * site.count for _, site, t in handle.sites)
    for _, site, t in handle.sites:
        each = t.index // (site.in_features * site.out_features)
        assert each.bincount().tolist() == [5] * site.count
    table = moved(sparse(tiny("llama"), SparseEntries(Uniform(number=9), sites="token")))
    (change,) = table.materialize().values()
    assert int((change != 0).sum()) == 9


def test_index_is_saved_as_small_integers_and_draws_depend_on_the_seed() -> None:
    index = [
        sparse(tiny("llama"), SparseEntries(Uniform(number=9), seed=s)).sites[0][2].index for s in (0, 0, 1)
    ]
    assert index[0].dtype == torch.int32
    assert torch.equal(index[0], index[1]) and not torch.equal(index[0], index[2])


def test_a_selection_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="selects no entry"):
        sparse(tiny("llama"), SparseEntries(Below(threshold=1e-30)))
