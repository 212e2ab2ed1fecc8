"""Compacter: H is the sum of Kronecker products, its A one parameter of all layers; counts, starts, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.delta.small import moved
from tests.models import tiny, tiny_batch
from tunewise.core.errors import UserError
from tunewise.core.handle import attach
from tunewise.delta.phm import CompacterAdapter, phm
from tunewise.sites import Site, find_sites, select, with_widths


def some(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(("n", "k", "e"), [(4, 16, 8), (2, 6, 4), (1, 5, 3)])
def test_h_is_the_explicit_sum(n: int, k: int, e: int) -> None:
    A, s, t = some(n, n, n), some(n, k // n, 1), some(n, 1, e // n)
    H = phm(A, s @ t)
    assert H.shape == (k, e) and s.numel() + t.numel() == k + e
    torch.testing.assert_close(H, sum(torch.kron(A[i], s[i] @ t[i]) for i in range(n)))
    if n == 1:
        assert torch.linalg.matrix_rank(H) == 1
        torch.testing.assert_close(H, A.item() * s[0] @ t[0])


def bert(**options: Any) -> tuple[Any, Any]:
    model = tiny("bert")
    return model, attach(model, CompacterAdapter(reduction=4, spread=0.5, **options), seed=0)


@pytest.mark.parametrize("rank", [1, 2, None])
def test_the_adapter_follows_the_formula(rank: int | None) -> None:
    model, handle = bert(rank=rank)
    moved(handle, 0.1)
    _, site, t = handle.sites[0]
    A, y = handle.tensors()["shared.compacter_adapter.A"].tensor, some(3, 32)

    def H(name: str) -> torch.Tensor:
        whole = rank is None
        B = getattr(t, f"{name}_B") if whole else getattr(t, f"{name}_s") @ getattr(t, f"{name}_t")
        return sum(torch.kron(A[i], B[i]) for i in range(4))  # type: ignore[return-value]

    low = F.gelu(y @ H("down") + t.down_bias, approximate="tanh")
    torch.testing.assert_close(t.part.output(t, y, y), y + low @ H("up") + t.up_bias)


def test_a_is_one_parameter_whose_gradient_all_layers_fill() -> None:
    model, handle = bert()
    A = handle.tensors()["shared.compacter_adapter.A"].tensor
    assert all(t.shared.A is A for _, _, t in handle.sites) and len(handle.sites) == 4
    loss = model(**tiny_batch("bert")).loss
    whole = torch.autograd.grad(loss, A)[0]
    parts = []
    for kept in range(4):
        other, same = bert()
        own = [t for _, _, t in same.sites]
        for i, t in enumerate(own):
            if i != kept:  # a constant in the place of the shared parameter
                t._shared = (type("Constant", (), {"A": t.shared.A.detach().clone()})(),)
        found = torch.autograd.grad(other(**tiny_batch("bert")).loss, own[kept].shared.A)[0]
        parts.append(found)
    assert all(p.abs().max() > 0 for p in parts)
    torch.testing.assert_close(sum(parts), whole)


def test_counts_as_the_paper_does() -> None:
    n, width, size = 4, 32, 8
    _, handle = bert()
    per_site = 2 * (width + size) + width + size
    assert handle.trainable == n**3 + 4 * per_site
    plus = attach(tiny("bert"), "compacter_plus_plus(reduction=4, norms=False)")
    assert plus.trainable == n**3 + 2 * per_site


def test_step_zero_is_near_the_base_and_with_zero_it_is_the_base() -> None:
    base = tiny("bert")(**tiny_batch("bert")).logits
    for zero in (False, True):
        model = tiny("bert")
        attach(model, CompacterAdapter(reduction=4, zero=zero), seed=0)
        far = float((model(**tiny_batch("bert")).logits - base).abs().max())
        assert far == 0.0 if zero else far < 1e-5
    loud, _ = bert()
    assert (loud(**tiny_batch("bert")).logits - base).abs().max() > 1e-3


def test_the_bottleneck_is_rounded_up_to_n_and_odd_widths_are_refused() -> None:
    everything = find_sites(tiny("bert"))
    site = with_widths(select(everything, "mlp", kinds=("mlp",)), everything)[0]
    assert [CompacterAdapter(reduction=r).width(site) for r in (32, 8, 3)] == [(32, 4), (32, 4), (32, 12)]
    with pytest.raises(UserError, match="not divisible by n=5"):
        attach(tiny("bert"), CompacterAdapter(n=5))
    with pytest.raises(UserError, match="The bottleneck of .*, 6, is not divisible by n=4"):
        CompacterAdapter(size=6).width(Site("x", "mlp", "mlp", tiny("bert"), in_features=32, out_features=32))
