"""LoRA, rsLoRA, LoRA+ and gated low rank: what the papers' equations promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.models import tiny, tiny_batch
from tunewise.core.errors import UserError
from tunewise.core.handle import attach
from tunewise.core.recipe import Recipe
from tunewise.delta.gated import GatedLowRank
from tunewise.delta.lora import LoRA
from tunewise.init.base import site_weight
from tunewise.init.svd import SVD


def _one(part: Any) -> tuple[nn.Linear, Any, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16))
    handle = attach(model, part, seed=1)
    return model[0], handle, handle.sites[0][2]  # type: ignore[return-value]


def test_at_the_start_b_alone_learns_and_the_rank_is_bounded() -> None:
    layer, handle, t = _one(LoRA(rank=3))
    layer(torch.randn(9, 24)).square().sum().backward()
    assert not t.A.grad.any() and t.B.grad.any()
    with torch.no_grad():
        t.B.normal_()
    assert int(torch.linalg.matrix_rank(handle.materialize()["0"])) == 3


def test_the_factor_of_rslora_falls_with_the_root_of_the_rank() -> None:
    from tunewise.core.method import read_recipe

    factors = [read_recipe(f"rslora(rank={r}, alpha=12)")["delta"][0].s for r in (4, 16)]  # type: ignore[attr-defined]
    assert factors == [6.0, 3.0]


@pytest.mark.parametrize("start", ["svd", "triplets", "gates"])
def test_gated_starts_are_the_base_and_every_gate_learns(start: Any) -> None:
    layer, handle, t = _one(GatedLowRank(rank=3, alpha=3.0, start=start))
    x = torch.randn(9, 24)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    with torch.no_grad():
        t.B.add_(0.1)
    layer(x).square().sum().backward()
    assert bool((t.g.grad != 0).all()) and handle.trainable == 3 * (24 + 16 + 1)
    with torch.no_grad():
        t.g.copy_(torch.tensor([1.0, 0.0, 2.0]))
    kept = t.B[:, [0, 2]] * torch.tensor([1.0, 2.0]) @ t.A[[0, 2]]
    change = kept - (t.B0 @ t.A0 if start == "svd" else 0.0)
    torch.testing.assert_close(handle.materialize()["0"], change, rtol=1e-4, atol=1e-5)


def test_sorsa_starts_orthonormal_at_the_top_of_w() -> None:
    handle = attach(tiny("llama"), "sorsa(rank=4)")
    t: Any
    for _, site, t in handle.sites:
        torch.testing.assert_close(t.A @ t.A.T, torch.eye(4), rtol=0, atol=1e-5)
        torch.testing.assert_close(t.B.T @ t.B, torch.eye(4), rtol=0, atol=1e-5)
        torch.testing.assert_close(t.g.detach(), torch.linalg.svdvals(site_weight(site))[:4])


def test_sorsa_with_its_values_folded_in_is_pissa() -> None:
    """B diag(S) A and (B sqrt(S)) (sqrt(S) A) are one function of other factors."""
    ours, theirs = tiny("llama"), tiny("llama")
    sorsa, pissa = attach(ours, "sorsa(rank=3)"), attach(theirs, "pissa(rank=3)")
    t: Any
    u: Any
    with torch.no_grad():
        for (_, _, t), (_, _, u) in zip(sorsa.sites, pissa.sites, strict=True):
            t.A.add_(torch.randn(t.A.shape) * 0.1)
            t.g.mul_(1.3)
            u.A.copy_(t.g.sqrt().unsqueeze(1) * t.A)
            u.B.copy_(t.B * t.g.sqrt())
    batch = tiny_batch("llama")
    torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, rtol=1e-4, atol=1e-5)


def test_gated_low_rank_takes_no_other_start() -> None:
    with pytest.raises(UserError, match="has starts of its own"):
        attach(nn.Sequential(nn.Linear(8, 8)), GatedLowRank(rank=2, init=SVD()))


def test_two_starts_on_one_layer_add_up() -> None:
    layer, handle, _ = _one(Recipe(delta=[LoRA(2, 2.0, init=SVD()), GatedLowRank(2, 2.0, start="svd")]))
    x = torch.randn(5, 24)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert handle.trainable == 2 * (24 + 16) * 2 + 2
