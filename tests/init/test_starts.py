"""Starts from weights: what they hold, that step 0 is the base, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.models import tiny, tiny_batch
from tunewise.core.errors import UserError
from tunewise.core.handle import Handle, attach, restore
from tunewise.delta.lora import LoRA
from tunewise.init.base import site_weight
from tunewise.init.from_delta import FromDelta
from tunewise.init.qr import QR
from tunewise.init.svd import SVD, top_svd

STARTS = [
    "pissa",
    'pissa(svd="random")',
    "pissa(alpha=4)",
    "olora",
    "olora(alpha=4)",
    "sorsa",
    "sorsa(alpha=4)",
]


def _moved(handle: Handle) -> Handle:
    make = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(torch.randn(p.shape, generator=make) * 0.1)
    return handle


def _logits(model: Any, name: str) -> torch.Tensor:
    batch = {k: v for k, v in tiny_batch(name).items() if k != "labels"}
    result: torch.Tensor = model(**batch).logits.detach()
    return result


@pytest.mark.parametrize("method", STARTS)
@pytest.mark.parametrize("plain", [False, True])
def test_step_zero_is_the_base_bit_by_bit(method: str, plain: bool) -> None:
    model = tiny("llama")
    before = _logits(model, "llama")
    handle = attach(model, method, plain=plain)
    assert all(bool(t.B0.any()) for _, _, t in handle.sites)
    assert torch.equal(_logits(model, "llama"), before)


def test_pissa_holds_the_top_of_w() -> None:
    handle = attach(tiny("llama"), "pissa(rank=4, alpha=12)")
    for _, site, t in handle.sites:
        wanted = torch.linalg.svdvals(site_weight(site))[:4]
        found = torch.linalg.svdvals(t.part.s * t.B @ t.A)[:4]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(t.A @ t.A.T, torch.diag(wanted / 3), rtol=1e-4, atol=1e-5)


def test_random_svd_is_near_the_exact_one_and_nearer_with_iterations() -> None:
    make = torch.Generator().manual_seed(0)
    W = torch.randn(96, 120, generator=make) * torch.logspace(0, -2, 120)
    u, s, v = top_svd(W, 6)
    errors = []
    state = torch.get_rng_state()
    for iterations in (1, 3, 12):
        x, y, z = top_svd(W, 6, iterations)
        errors.append(float((x * y @ z - u * s @ v).norm() / (u * s @ v).norm()))
        assert x.shape == u.shape and z.shape == v.shape
    assert torch.equal(torch.get_rng_state(), state)
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-3


@pytest.mark.parametrize("base", ["gpt2", "mixtral"])
def test_starts_know_transposed_weights_embeddings_and_experts(base: str) -> None:
    model = tiny(base)
    before = _logits(model, base)
    part = LoRA(
        rank=2, alpha=2.0, init=SVD(), sites="linear | embedding | experts" if base == "mixtral" else "all"
    )
    handle = attach(model, part)
    assert len({site.kind for _, site, _ in handle.sites}) > 1
    assert torch.equal(_logits(model, base), before)
    for _, site, t in handle.sites:
        u, s, v = top_svd(site_weight(site), 2)
        torch.testing.assert_close(t.B @ t.A, u * s.unsqueeze(-2) @ v, rtol=1e-3, atol=1e-4)


def test_dropout_acts_on_the_trained_path_alone() -> None:
    handle = _moved(attach(nn.Sequential(nn.Linear(16, 12)), LoRA(2, 2.0, dropout=0.5, init=SVD())))
    (_, site, t), x = handle.sites[0], torch.randn(64, 16)
    site.module.eval()
    t.eval()
    whole = site.module(x)
    t.train()
    torch.manual_seed(3)
    found = torch.stack([site.module(x) for _ in range(3000)]).mean(0)
    torch.testing.assert_close(found, whole, rtol=0, atol=0.1)
    frozen = nn.functional.linear(x, site.module.weight - t.B0 @ t.A0, site.module.bias)  # type: ignore[arg-type]
    with torch.no_grad():
        t.B.zero_()
    torch.testing.assert_close(site.module(x), frozen, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_the_residual_form() -> None:
    model = nn.Sequential(nn.Linear(16, 12))
    handle = _moved(attach(model, LoRA(3, 6.0, init=SVD())))
    t, layer, x = handle.sites[0][2], model[0], torch.randn(9, 16)
    A, B = t.A.detach().clone().requires_grad_(), t.B.detach().clone().requires_grad_()
    residual = layer.weight.detach() - 2.0 * t.B0 @ t.A0
    wanted = nn.functional.linear(x, residual + 2.0 * B @ A, layer.bias)  # type: ignore[arg-type]
    wanted.square().sum().backward()
    found = model(x)
    found.square().sum().backward()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(t.A.grad, A.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(t.B.grad, B.grad, rtol=1e-4, atol=1e-4)


def test_from_delta_takes_over_the_best_approximation(tmp_path: Path) -> None:
    model = tiny("llama")
    other = _moved(attach(model, 'lora(rank=3, sites="query | up")'))
    changes, answer = other.materialize(), _logits(model, "llama")
    other.save(tmp_path)
    other.detach()
    base = _logits(model, "llama")
    handle = attach(model, LoRA(rank=4, alpha=8.0, init=FromDelta(str(tmp_path)), sites="query | value | up"))
    assert not handle.recipe["delta"][0].identity  # type: ignore[attr-defined]
    torch.testing.assert_close(_logits(model, "llama"), answer, rtol=1e-4, atol=1e-5)
    for name, change in handle.materialize().items():
        torch.testing.assert_close(change, changes.get(name, torch.zeros_like(change)), rtol=1e-3, atol=1e-6)
    for _, _, t in handle.sites:  # nothing starts dead
        assert bool((t.A.abs().sum(1) + t.B.abs().sum(0) > 0).all())
    handle.detach()
    assert torch.equal(_logits(model, "llama"), base)
    small = attach(model, LoRA(rank=1, alpha=1.0, init=FromDelta(str(tmp_path)), sites="query"))
    for _, site, t in small.sites:
        best = torch.linalg.svdvals(changes[site.name])[1:].norm()
        assert abs(float((changes[site.name] - t.B @ t.A).norm()) - float(best)) < 1e-4
    small.detach()
    with pytest.raises(UserError, match="changes none of these sites; it changes model.layers.0"):
        attach(model, LoRA(init=FromDelta(str(tmp_path)), sites="down"))


def test_a_saved_start_is_restored_without_being_made_again(tmp_path: Path) -> None:
    model = tiny("llama")
    handle = _moved(attach(model, "pissa(rank=2)"))
    wanted = _logits(model, "llama")
    handle.save(tmp_path)
    again = tiny("llama")
    restore(again, tmp_path)
    assert torch.equal(_logits(again, "llama"), wanted)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (LoRA(rank=40, init=SVD()), "SVD: .* has 32 directions, fewer than rank=40"),
        (LoRA(alpha=0.0, init=QR()), "QR divides by alpha / rank"),
        (LoRA(init=FromDelta("nowhere")), "nowhere holds no adaptation"),
    ],
)
def test_what_no_start_can_be_is_refused(part: LoRA, words: str) -> None:
    with pytest.raises(UserError, match=words):
        attach(tiny("llama"), part)


def test_deltas_with_a_start_of_their_own_take_none() -> None:
    class Own(LoRA):
        def tensors(self, site: Any) -> Any:
            return {"C": super().tensors(site)["A"]}

    with pytest.raises(UserError, match="Own has a start of its own and takes none as init"):
        attach(tiny("llama"), Own(init=SVD()))


def test_other_things_than_starts_are_refused() -> None:
    with pytest.raises(UserError, match="LoRA: init='pissa' is not valid"):
        LoRA(init="pissa")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="SVD has no option 'rnak'"):
        SVD(rnak=3)  # type: ignore[call-arg]
    assert attach(tiny("llama"), "lora(rank=2, init=SVD(method='random'))").trainable > 0
