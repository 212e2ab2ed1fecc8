"""The fused products are their eager twins, in values, gradients and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.delta.box import Box
from tests.models import tiny, tiny_batch
from tunewise.core.errors import RunError
from tunewise.core.handle import attach
from tunewise.delta.fused import beside_linear, changed_linear, kept_rows

METHODS = [
    "loha(rank=2)",
    "lokr(rank=2)",
    "vera(rank=4)",
    "fourierft(frequencies=40)",
    "loca(frequencies=40)",
]


def change(W: Tensor, a: Tensor, b: Tensor, keep: Tensor | None) -> Tensor:
    new = W + torch.tanh(a) @ b
    return new if keep is None else new * keep


def path(x: Tensor, a: Tensor, b: Tensor, keep: Tensor | None) -> Tensor:
    y = torch.tanh(x @ b.to(x.dtype).T) @ a.to(x.dtype).T
    return y if keep is None else y * keep.T


def _inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    made = [torch.randn(s, dtype=dtype) for s in ((2, 3, 4), (5, 4), (5,), (5, 2), (2, 4))]
    return tuple(v.requires_grad_(i in (0, 3, 4)) for i, v in enumerate(made))


@pytest.mark.parametrize("keep", [None, torch.rand(5, 1, dtype=torch.float64)])
@pytest.mark.parametrize("which", ["changed", "beside"])
def test_gradients(which: str, keep: Tensor | None) -> None:
    x, W, bias, a, b = _inputs()
    make: Any = {"changed": (changed_linear, change), "beside": (beside_linear, path)}[which]

    def fused(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return make[0](make[1], x, W, bias, a, b, keep)  # type: ignore[no-any-return]

    eager = F.linear(x, change(W, a, b, keep), bias)
    if which == "beside":
        eager = F.linear(x, W, bias) + path(x, a, b, keep)
    torch.testing.assert_close(fused(x, a, b), eager)
    assert torch.autograd.gradcheck(fused, (x, a, b))
    assert torch.autograd.gradcheck(lambda a: fused(x.detach(), a, b.detach()), (a,))


@pytest.mark.parametrize("method", METHODS)
def test_fused_equals_plain_and_refuses_a_second_derivative(method: str) -> None:
    models = [tiny("llama"), tiny("llama")]
    first, second = (attach(m, method, plain=p, seed=1) for m, p in zip(models, (False, True), strict=True))
    with torch.no_grad():
        for p, q in zip(first.parameters(), second.parameters(), strict=True):
            p.add_(torch.randn(p.shape) * 0.02)
            q.copy_(p)
    for length in (3, 60):
        losses = [m(**tiny_batch("llama", length=length)).loss for m in models]
        torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
        found, wanted = (
            torch.autograd.grad(loss, h.parameters()) for loss, h in zip(losses, (first, second), strict=True)
        )
        largest = max(float(g.abs().max()) for g in wanted)
        for f, w in zip(found, wanted, strict=True):
            assert float((f - w).abs().max()) <= 1e-5 * largest
    loss = models[0](**tiny_batch("llama")).loss
    with pytest.raises(RunError, match="second derivative"):
        torch.autograd.grad(loss, first.parameters(), create_graph=True)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_dense_is_kept_between_forward_and_backward(method: str) -> None:
    model = Box(96, 96)
    handle = attach(model, method.replace(")", ', sites="linear")'))
    kept: list[int] = []
    x = torch.randn(300, 96, requires_grad=True)

    def pack(value: Tensor) -> Tensor:
        if value.data_ptr() not in (x.data_ptr(), model.inner.weight.data_ptr()):
            kept.append(value.numel())
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        model(x)
    assert handle.trainable and max(kept, default=0) < 96 * 96 // 2


def test_half_precision_keeps_changes_that_a_rounded_weight_would_lose() -> None:
    W, x = torch.ones(8, 16, dtype=torch.bfloat16), torch.ones(4, 16, dtype=torch.bfloat16)
    assert torch.equal(W + 1e-3, W)
    a, b = torch.full((8, 1), 1e-3), torch.ones(1, 16)
    bias = torch.full((8,), -16.0, dtype=torch.bfloat16)
    y = changed_linear(lambda W, a, b: W + a @ b, x, W, bias, a, b)
    torch.testing.assert_close(y.float(), torch.full((4, 8), 16e-3), rtol=0.01, atol=0)


def test_autocast_computes_in_its_dtype() -> None:
    x, W, bias, a, b = (v.detach().float().requires_grad_(v.requires_grad) for v in _inputs())
    for make, body in ((changed_linear, change), (beside_linear, path)):
        with torch.autocast("cpu", torch.bfloat16):
            y = make(body, x, W, bias, a, b, None)  # type: ignore[operator]
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), make(body, x, W, bias, a, b, None), rtol=0.05, atol=0.1)  # type: ignore[operator]
        y.float().sum().backward()
    assert a.grad is not None and a.grad.dtype == torch.float32


def test_rows_are_dropped_in_training_alone() -> None:
    t, like = nn.Module(), torch.zeros(1)
    assert kept_rows(t.eval(), like, 10, 0.5, 0.5) is None
    assert kept_rows(t.train(), like, 10, 0.0, 0.0) is None
    keep = kept_rows(t, like, 1000, 0.25, 0.0)
    assert keep is not None and keep.shape == (1000, 1)
    assert 150 < int((keep == 0).sum()) < 350
    torch.testing.assert_close(keep.mean(), torch.tensor(1.0))
    plain = kept_rows(t, like, 1000, 0.25, 0.0, scaled=False)
    assert plain is not None and {*plain.flatten().tolist()} == {0.0, 1.0}
    whole = [kept_rows(t, like, 4, 0.0, 0.5) for _ in range(50)]
    assert {float(k.mean()) for k in whole if k is not None} == {0.0, 1.0}
