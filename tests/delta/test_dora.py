"""DoRA's card: identity, what magnitudes do, constants in the gradient, and where it stands."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import tiny, tiny_batch
from tunewise.core.errors import UserError
from tunewise.core.forward import forward_of
from tunewise.core.handle import Handle, attach
from tunewise.core.recipe import Recipe
from tunewise.delta.dora import DoRA
from tunewise.delta.existing import ExistingWeights
from tunewise.delta.lora import LoRA

S = 16 / 3


def layer(
    out: int = 5, into: int = 7, bias: bool = True, dtype: torch.dtype = torch.float64
) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(into, out, bias=bias)).to(dtype)


def adapted(model: nn.Module, delta: Any = None, moved: bool = True, **options: Any) -> tuple[Handle, Any]:
    """The handle, and the tensors of the first site."""
    dtype = next(model.parameters()).dtype
    handle = attach(model, Recipe(delta=delta or DoRA(rank=3)), dtype=dtype, seed=1, **options)
    make = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in handle.parameters() if moved else ():
            p.add_(torch.randn(p.shape, generator=make, dtype=torch.float64).to(p.dtype) * 0.2)
    return handle, handle.sites[0][2]


def parts(model: nn.Sequential, t: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(V, its norms, bias), written down independently."""
    V = model[0].weight + S * t.B @ t.A  # type: ignore[operator]
    bias: Any = model[0].bias
    return V, V.detach().pow(2).sum(1).sqrt(), bias


def test_it_starts_as_the_base_and_is_tagged() -> None:
    model, x = layer(), torch.randn(4, 7, dtype=torch.float64)
    before = model(x)
    handle, t = adapted(model, moved=False)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(t.m, model[0].weight.norm(dim=1))  # type: ignore[operator]
    assert {n.rpartition(".")[2]: i.tag for n, i in handle.tensors().items()} == {
        "A": "direction",
        "B": "direction",
        "m": "magnitude",
    }
    assert handle.trainable == 3 * (5 + 7) + 5


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_the_equation(bias: bool, tokens: int, plain: bool) -> None:
    model, x = layer(bias=bias), torch.randn(tokens, 7, dtype=torch.float64, requires_grad=True)
    _, t = adapted(model, plain=plain)
    V, norms, b = parts(model, t)
    wanted = F.linear(x, (t.m / norms)[:, None] * V, b)  # norms without gradient
    found = model(x)
    torch.testing.assert_close(found, wanted)
    g = torch.randn_like(wanted)
    leaves = [x, t.A, t.B, t.m]
    mine, right = (torch.autograd.grad(y, leaves, g, retain_graph=True) for y in (found, wanted))
    for a, c in zip(mine, right, strict=True):
        torch.testing.assert_close(a, c)
    by_card = (g * F.linear(x, V)).sum(0) / norms  # dL/dm_i = sum (dL/dy_i) (V x)_i / |V_i|
    torch.testing.assert_close(mine[3], by_card)


def test_scaling_the_magnitudes_scales_the_outputs_without_bias() -> None:
    model, x = layer(), torch.randn(4, 7, dtype=torch.float64)
    _, t = adapted(model)
    bias: Any = model[0].bias
    before = model(x) - bias
    with torch.no_grad():
        t.m.mul_(3)
    torch.testing.assert_close(model(x) - bias, 3 * before)


def test_with_magnitudes_tied_to_the_norms_it_is_lora() -> None:
    model, x = layer(), torch.randn(4, 7, dtype=torch.float64)
    _, t = adapted(model)
    V, norms, b = parts(model, t)
    with torch.no_grad():
        t.m.copy_(norms)
    torch.testing.assert_close(model(x), F.linear(x, V, b))


@pytest.mark.parametrize("plain", [True, False])
def test_under_dropout_the_base_sees_everything(plain: bool) -> None:
    model, x = layer(into=30), torch.randn(200, 30, dtype=torch.float64)
    _, t = adapted(model, DoRA(rank=3, dropout=0.5), plain=plain)
    model.train()
    V, norms, b = parts(model, t)
    with torch.no_grad():
        base = F.linear(x, model[0].weight) * (t.m / norms)  # type: ignore[arg-type]
        low = torch.stack([model(x) - b - base for _ in range(200)])
        wanted = F.linear(x, V) * (t.m / norms) - base
        assert float((low[0] - low[1]).abs().max()) > 0.1
        torch.testing.assert_close(low.mean(0), wanted, rtol=0.2, atol=0.25 * float(wanted.abs().max()))
        t.B.zero_()
        torch.testing.assert_close(model(x), model.eval()(x))  # nothing random is left


def test_fused_and_plain_draw_alike() -> None:
    found = []
    for plain in (False, True):
        model = tiny("llama").train()
        handle, _ = adapted(model, DoRA(rank=2, dropout=0.3), plain=plain)
        assert (forward_of(handle.sites[0][1].module).plan.product is None) is plain  # type: ignore[union-attr]
        torch.manual_seed(5)
        model(**tiny_batch("llama", size=4)).loss.backward()
        found.append([p.grad for p in handle.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_known_norms_follow_the_base() -> None:
    model, x = layer(), torch.randn(4, 7, dtype=torch.float64)
    _, t = adapted(model)
    model(x)
    with torch.no_grad():
        model[0].weight.mul_(2)  # type: ignore[operator]
    V, norms, b = parts(model, t)
    torch.testing.assert_close(model(x), F.linear(x, (t.m / norms)[:, None] * V, b))
    model[0].weight = nn.Parameter(torch.randn(5, 7, dtype=torch.float64), requires_grad=False)
    V, norms, b = parts(model, t)
    torch.testing.assert_close(model(x), F.linear(x, (t.m / norms)[:, None] * V, b))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].weight.add_(1)  # type: ignore[operator]
    assert not torch.allclose(twin(x), model(x))


def test_a_row_of_zeros_stays_one_without_nan() -> None:
    model, x = layer(), torch.randn(40, 7, dtype=torch.float64)
    with torch.no_grad():
        model[0].weight[2] = 0  # type: ignore[index]
    handle, _ = adapted(model, moved=False)
    before = F.linear(x, model[0].weight, model[0].bias)  # type: ignore[arg-type]
    y = model(x)
    torch.testing.assert_close(y, before)
    y.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in handle.parameters() if p.grad is not None)


@pytest.mark.parametrize("order", [[DoRA(rank=3), LoRA(rank=2)], [LoRA(rank=2), DoRA(rank=3)]])
def test_beside_another_delta_it_changes_what_it_is_given(order: list[Any]) -> None:
    model, x = layer(), torch.randn(4, 7, dtype=torch.float64)
    handle, _ = adapted(model, order)
    wanted: Tensor = model[0].weight.detach()  # type: ignore[assignment]
    for _, _, t in handle.sites:
        wanted = t.part.weight(t, wanted)
    torch.testing.assert_close(model(x), F.linear(x, wanted, model[0].bias))  # type: ignore[arg-type]
    before = model(x)
    handle.merge()
    torch.testing.assert_close(model(x), before)


def test_dropout_beside_another_delta_is_refused_in_words() -> None:
    model = layer()
    adapted(model, [LoRA(rank=2), DoRA(rank=3, dropout=0.1)])
    model.train()
    with pytest.raises(UserError, match="cannot be trained beside other deltas of the same weight"):
        model(torch.randn(4, 7, dtype=torch.float64))
    model.eval()(torch.randn(4, 7, dtype=torch.float64))


@pytest.mark.parametrize("which", ["bias", "weight"])
def test_a_base_that_is_trained_gets_its_gradient(which: str) -> None:
    model, x = layer(), torch.randn(9, 7, dtype=torch.float64)
    recipe = [DoRA(rank=3), ExistingWeights("all", which)]  # type: ignore[arg-type]
    _, t = adapted(model, recipe)
    V, norms, b = parts(model, t)
    trained: Any = getattr(model[0], which)
    wanted = F.linear(x, (t.m / norms)[:, None] * V, b)
    for a, c in zip(
        *(torch.autograd.grad(y.square().sum(), [trained, t.A, t.m]) for y in (model(x), wanted)), strict=True
    ):
        torch.testing.assert_close(a, c)


@pytest.mark.parametrize(("name", "sites"), [("gpt2", "linear"), ("phi3", "query"), ("llama", "embedding")])
def test_turned_narrowed_and_embedding_weights(name: str, sites: str) -> None:
    model, batch = tiny(name), tiny_batch(name)
    before = model(**batch).logits.detach()
    handle, _ = adapted(model, DoRA(rank=2, sites=sites), moved=False)
    torch.testing.assert_close(model(**batch).logits, before, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(torch.randn(p.shape) * 0.05)
    moved = model(**batch).logits.detach()
    assert float((moved - before).abs().max()) > 1e-3
    handle.merge()
    torch.testing.assert_close(model(**batch).logits, moved, rtol=1e-5, atol=1e-5)


def test_experts_have_a_magnitude_per_row_and_no_dropout() -> None:
    model = tiny("mixtral")
    before = model(**tiny_batch("mixtral")).logits
    handle, t = adapted(model, DoRA(rank=2, sites="experts"), moved=False)
    assert t.m.shape == t.B.shape[:-1]
    torch.testing.assert_close(model(**tiny_batch("mixtral")).logits, before, rtol=1e-5, atol=1e-6)
    handle.detach()
    with pytest.raises(UserError, match="no dropout on the experts"):
        attach(model, DoRA(rank=2, dropout=0.1, sites="experts"))


def test_in_half_precision_magnitudes_are_not_rounded() -> None:
    """m / |V| = 1.006 is 1.0078 in bfloat16."""
    model, x = layer(64, 64, dtype=torch.bfloat16), torch.randn(300, 64).bfloat16()
    handle = attach(model, DoRA(rank=2), seed=1)
    before = model(x).float()
    with torch.no_grad():
        for name, info in handle.tensors().items():
            info.tensor.mul_(1.006 if name.endswith(".m") else 1.0)
    bias: Any = model[0].bias
    grown = ((model(x).float() - bias.float()).abs().mean() / (before - bias.float()).abs().mean()).item()
    assert 1.005 < grown < 1.007


def test_it_has_no_low_rank_components() -> None:
    assert "components" not in DoRA.gives and not hasattr(DoRA(), "components")
