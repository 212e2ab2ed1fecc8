"""Contract 13: fused code has a plain twin, equal in values and gradients, and refuses second derivatives."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import tiny, tiny_batch
from tunewise.core.errors import RunError
from tunewise.core.forward import forward_of
from tunewise.core.handle import Handle, attach
from tunewise.core.part import Part
from tunewise.core.recipe import Recipe
from tunewise.delta import kernels
from tunewise.delta.existing import ExistingWeights
from tunewise.delta.lora import LoRA

# tokens, in, out: with many tokens the dense W' pays, with few the two thin products do
CASES = [pytest.param((2, 9, 4, 3), True, id="dense"), pytest.param((1, 2, 12, 16), False, id="thin")]


def tensors(shape: tuple[int, ...], bias: bool = True, rank: int = 2) -> list[Tensor | None]:
    rows, length, width, out = shape
    make = torch.Generator().manual_seed(0)

    def randn(*size: int, grad: bool = True) -> Tensor:
        return torch.randn(*size, generator=make, dtype=torch.float64).requires_grad_(grad)

    b = randn(out, grad=False) if bias else None
    return [
        randn(rows, length, width),
        randn(out, width, grad=False),
        b,
        randn(rank, width),
        randn(out, rank),
    ]


def eager(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float) -> Tensor:
    return F.linear(x, W + s * B @ A, b)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "dense"), CASES)
def test_values_and_gradients_equal_the_plain_twin(shape: tuple[int, ...], dense: bool, bias: bool) -> None:
    given = tensors(shape, bias)
    x, W = given[0], given[1]
    assert x is not None and W is not None
    assert kernels._dense_pays(x.shape[0] * x.shape[1], *W.shape) == dense
    assert torch.autograd.gradcheck(lambda *t: kernels.low_rank_linear(*t, 0.7), given)
    found, wanted = kernels.low_rank_linear(*given, 0.7), eager(*given, 0.7)  # type: ignore[arg-type]
    torch.testing.assert_close(found, wanted)
    g, inputs = torch.randn_like(found), [t for t in given if t is not None and t.requires_grad]
    for a, b in zip(
        torch.autograd.grad(found, inputs, g), torch.autograd.grad(wanted, inputs, g), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("shape", "dense"), CASES)
def test_an_input_without_gradient_gets_none(shape: tuple[int, ...], dense: bool) -> None:
    given = tensors(shape)
    assert given[0] is not None
    given[0].requires_grad_(False)
    assert torch.autograd.gradcheck(lambda A, B: kernels.low_rank_linear(*given[:3], A, B, 0.7), given[3:])


@pytest.mark.parametrize(("shape", "dense"), CASES)
def test_a_second_derivative_raises(shape: tuple[int, ...], dense: bool) -> None:
    x, W, b, A, B = tensors(shape)
    y = kernels.low_rank_linear(x, W, b, A, B, 0.7).square().sum()  # type: ignore[arg-type]
    with pytest.raises(RunError, match="no second derivative: attach with plain=True"):
        torch.autograd.grad(y, [A], create_graph=True)  # type: ignore[list-item]
    with pytest.raises(RunError, match="no second derivative"):
        y.backward(create_graph=True)


def first(handle: Handle) -> Any:
    found = forward_of(handle.sites[0][1].module)
    assert found is not None
    return found.plan


def gradients(model: nn.Module, handle: Handle) -> dict[str, Tensor]:
    model(**tiny_batch("llama", size=4)).loss.backward()
    return {n: i.tensor.grad for n, i in handle.tensors().items()}  # type: ignore[misc]


def moved(handle: Handle) -> Handle:
    make = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(torch.randn(p.shape, generator=make) * 0.05)
    return handle


def test_the_plain_form_is_chosen_on_demand_and_equal() -> None:
    fused, plain = tiny("llama"), tiny("llama")
    a = moved(attach(fused, "lora(rank=2)", seed=1))
    b = moved(attach(plain, "lora(rank=2)", seed=1, plain=True))
    assert first(a).product is not None and first(b).product is None and first(b).outputs
    x, y = gradients(fused, a), gradients(plain, b)
    for name in x:
        torch.testing.assert_close(x[name], y[name], rtol=1e-4, atol=1e-6)


class Curvature(Part):
    slot: ClassVar[str] = "diagnose"
    needs: ClassVar[frozenset[str]] = frozenset({"second_order"})


class PerSample(Part):
    slot: ClassVar[str] = "diagnose"
    needs: ClassVar[frozenset[str]] = frozenset({"per_sample"})


class Internals(Part):
    slot: ClassVar[str] = "diagnose"
    needs: ClassVar[frozenset[str]] = frozenset({"internals"})


@pytest.mark.parametrize("part", [Curvature, PerSample, Internals])
def test_a_part_that_needs_it_gets_the_plain_form(part: type[Part]) -> None:
    model = tiny("llama")
    handle = moved(attach(model, Recipe(delta=LoRA(2), diagnose=part())))
    assert handle.plain and all(forward_of(s.module).plan.product is None for _, s, _ in handle.sites)  # type: ignore[union-attr]
    if part is Curvature:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            loss = model(**tiny_batch("llama")).loss
            (g,) = torch.autograd.grad(loss, handle.parameters()[0], create_graph=True)
            (h,) = torch.autograd.grad(g.square().sum(), handle.parameters()[0])
        assert h.abs().max() > 0


@pytest.mark.parametrize("which", ["bias", "weight", "all"])
def test_base_weights_trained_beside_a_fused_delta_get_their_gradient(which: str) -> None:
    found = []
    for plain in (False, True):
        model = tiny("bert")
        recipe = Recipe(delta=[LoRA(2), ExistingWeights("linear & layers[0]", which)])  # type: ignore[arg-type]
        handle = moved(attach(model, recipe, seed=1, plain=plain))
        model(**tiny_batch("bert")).loss.backward()
        found.append({n: i.tensor.grad for n, i in handle.tensors().items()})
    for name, value in found[1].items():
        assert value is not None and found[0][name] is not None, name
        torch.testing.assert_close(found[0][name], value, rtol=1e-4, atol=1e-7)


def test_dropout_is_drawn_alike_in_both_forms() -> None:
    found = []
    for plain in (False, True):
        model = tiny("llama").train()
        handle = moved(attach(model, "lora(rank=2, dropout=0.5)", seed=1, plain=plain))
        torch.manual_seed(5)
        found.append(gradients(model, handle))
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-4, atol=1e-6)
