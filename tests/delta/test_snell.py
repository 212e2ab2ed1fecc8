"""Kernelised sparse changes: competition, distances, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models import tiny, tiny_batch
from tunewise.core.errors import UserError
from tunewise.core.handle import attach
from tunewise.delta.snell import KernelEntries, compete, distances

QUERY = "model.layers.0.self_attn.q_proj"


def factors(n: int, m: int, r: int) -> list[torch.Tensor]:
    make = torch.Generator().manual_seed(0)
    return [torch.randn(k, r, generator=make, dtype=torch.float64) * 0.2 for k in (n, m, n, m)]


def test_distances_are_those_of_cdist_with_its_gradient() -> None:
    a, b, _, _ = (f.requires_grad_() for f in factors(5, 7, 3))
    far = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(distances(a, b), far)
    wanted = torch.autograd.grad(far.square().sum(), (a, b))
    for g, w in zip(torch.autograd.grad(distances(a, b).square().sum(), (a, b)), wanted, strict=True):
        torch.testing.assert_close(g, w)


def test_coinciding_points_have_no_gradient_and_equal_pairs_no_change() -> None:
    a = torch.ones(3, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(distances(a, torch.ones(4, 2)).sum(), a)
    assert torch.equal(grad, torch.zeros(3, 2))
    o, i, _, _ = factors(6, 5, 2)
    assert torch.equal(KernelEntries(sparsity=0.0).change(o, i, o, i), torch.zeros(6, 5, dtype=torch.float64))


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("sparsify", ["mask", "signed_square"])
def test_competition_keeps_the_largest_and_gives_the_others_no_gradient(
    sparsity: float, sparsify: str
) -> None:
    D = torch.randn(20, 30, generator=torch.Generator().manual_seed(1), requires_grad=True)
    S = compete(D, sparsity, sparsify)
    kept = S != 0
    assert int(kept.sum()) == 600 - int(sparsity * 600)
    assert D.detach().abs()[kept].min() > D.detach().abs()[~kept].max() if sparsity else kept.all()
    torch.testing.assert_close(S[kept], (D if sparsify == "mask" else D * D.abs())[kept])
    (grad,) = torch.autograd.grad(S.sum(), D)
    wanted = torch.ones_like(D) if sparsify == "mask" else D.detach().abs()
    torch.testing.assert_close(grad, wanted * kept)


def test_rank_of_the_change_is_not_bounded_by_the_factors() -> None:
    change = KernelEntries(rank=4, sparsity=0.0, sparsify="mask").change(*factors(40, 40, 2))
    assert int(torch.linalg.matrix_rank(change)) > 20


def gradients(plain: bool) -> tuple[torch.Tensor, torch.Tensor]:
    model = tiny("llama")
    handle = attach(model, KernelEntries(sparsify="mask"), plain=plain, seed=1)
    out = model(**tiny_batch("llama"))
    out.loss.backward()
    return out.logits.detach(), torch.cat([p.grad.reshape(-1) for p in handle.parameters()])  # type: ignore[union-attr]


def test_recomputed_product_equals_the_plain_one() -> None:
    for a, b in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_no_dense_change_is_kept_for_the_backward_pass() -> None:
    model = tiny("llama")
    attach(model, KernelEntries(sites=QUERY))
    base, kept = model.get_submodule(QUERY).weight, []

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        y = model.get_submodule(QUERY)(torch.randn(3, 32, requires_grad=True))
    assert y.requires_grad and not any(k.shape == (32, 32) and k.data_ptr() != base.data_ptr() for k in kept)


def test_second_derivative_goes_through() -> None:
    model = tiny("llama")
    handle = attach(model, KernelEntries(sites=QUERY, sparsify="mask", sparsity=0.0), plain=True)
    p = handle.parameters()
    y = model.get_submodule(QUERY)(torch.randn(3, 32)).square().sum()
    (g,) = torch.autograd.grad(y, p[0], create_graph=True)
    assert torch.autograd.grad(g.square().sum(), p[0])[0].any()


def test_near_the_base_at_step_0_and_as_many_numbers_as_lora() -> None:
    model, plain = tiny("llama"), tiny("llama")
    handle = attach(model, KernelEntries(rank=8), seed=1)
    assert handle.trainable == attach(plain, "lora(rank=8)").trainable
    size = max(float(c.abs().max()) for c in handle.materialize().values())
    assert 0 < size < 2e-3


def test_odd_ranks_are_refused() -> None:
    wrong: dict[str, Any] = {"rank": 3}
    with pytest.raises(UserError, match="multiple of 2"):
        KernelEntries(**wrong)
