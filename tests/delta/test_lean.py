"""Lean layers: the same numbers, less kept, and no trace afterwards."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import tiny, tiny_batch
from tunewise.core.errors import RunError
from tunewise.core.handle import Handle, attach
from tunewise.core.run import Run
from tunewise.delta.lean import RMSNorm, SwiGLU, lean, lean_layers
from tunewise.loop.settings import Settings


def adapted(name: str, method: Any, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Handle]:
    model = tiny(name).to(dtype).train()
    handle = attach(model, method, seed=1)
    make = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(torch.randn(p.shape, generator=make) * 0.05)
    return model, handle


def step(model: nn.Module, handle: Handle) -> tuple[Tensor, list[Tensor | None], int]:
    """(loss, gradients, bytes that autograd keeps beside parameters)."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return t.detach()

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(**tiny_batch("llama", size=4, length=40)).loss
    loss.backward()
    gradients = [p.grad for p in handle.parameters()]
    for p in handle.parameters():
        p.grad = None
    return loss.detach(), gradients, sum(kept.values())


METHODS = ["lora(rank=2)", "lora(rank=2, dropout=0.3)", "dora(rank=2)", 'lora(rank=2, sites="query")']


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "layers"), [("llama", 7), ("qwen3", 11), ("phi3", 5), ("gemma", 0)])
def test_losses_and_gradients_stay(name: str, layers: int, method: str, dtype: torch.dtype) -> None:
    model, handle = adapted(name, method, dtype)
    plain, wanted, much = step(model, handle)
    before = {n: dict(m.__dict__) for n, m in model.named_modules()}
    with lean(model) as count:
        loss, gradients, little = step(model, handle)
    assert count == layers and torch.equal(loss, plain)
    for a, b in zip(gradients, wanted, strict=True):
        tolerance = 1e-5 if dtype is torch.float32 else 1e-2
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))  # type: ignore[union-attr]
    assert {n: dict(m.__dict__).keys() for n, m in model.named_modules()} == {
        n: d.keys() for n, d in before.items()
    }
    assert little < 0.8 * much if name in ("llama", "qwen3") and "query" not in method else little <= much


def test_what_is_no_plain_layer_stays_as_it_is() -> None:
    model, _ = adapted("llama", 'lora(rank=2, sites="query")')
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.requires_grad_("norm" in name)
    wanted = model(**tiny_batch("llama")).loss
    with lean(model):
        loss = model(**tiny_batch("llama")).loss
        loss.backward()
    assert torch.equal(loss, wanted)
    assert all(p.grad is not None for n, p in model.named_parameters() if "norm" in n)


def test_an_adapter_on_the_mlp_stays_on_top() -> None:
    model, handle = adapted("llama", "parallel_adapter")
    plain, wanted, _ = step(model, handle)
    with lean(model) as count:
        loss, gradients, _ = step(model, handle)
        assert count == 7
        with handle.disabled():
            assert not torch.equal(model(**tiny_batch("llama")).logits, loss)
    assert torch.equal(loss, plain)
    for a, b in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    handle.detach()
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_copies_and_pickles_work_inside() -> None:
    model, _ = adapted("llama", "lora(rank=2)")
    batch = tiny_batch("llama")
    with lean(model):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for p in twin.parameters():
                p.mul_(0.5)
        assert not torch.allclose(twin(**batch).loss, model(**batch).loss)
        again = pickle.loads(pickle.dumps(model))
        assert torch.equal(again(**batch).loss, model(**batch).loss)


def test_without_gradients_nothing_is_different() -> None:
    model, _ = adapted("llama", "lora(rank=2)")
    with torch.no_grad():
        wanted = model(**tiny_batch("llama")).logits
        with lean(model):
            assert torch.equal(model(**tiny_batch("llama")).logits, wanted)


def test_functions_have_right_gradients_and_no_second_ones() -> None:
    x, y = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w = torch.randn(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(SwiGLU.apply, (x, y))
    assert torch.autograd.gradcheck(lambda x: RMSNorm.apply(x, w, 1e-6), (x,))  # type: ignore[no-untyped-call]
    for z in (SwiGLU.apply(x, y), RMSNorm.apply(x, w, 1e-6)):  # type: ignore[no-untyped-call]
        with pytest.raises(RunError, match="no second derivative"):
            torch.autograd.grad(z.square().sum(), x, create_graph=True)


@pytest.mark.parametrize(
    ("options", "settings", "layers"),
    [
        ({}, {}, 7),
        ({"plain": True}, {}, 0),
        ({}, {"gradient_checkpointing": True}, 0),
    ],
)
def test_a_run_uses_them_where_it_may(options: dict[str, Any], settings: dict[str, Any], layers: int) -> None:
    handle = attach(tiny("llama"), "lora(rank=2)", **options)
    with lean_layers(Run(handle, settings=Settings(**settings))) as count:
        assert count == layers
