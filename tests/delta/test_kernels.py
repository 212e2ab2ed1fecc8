"""The kernel that low-rank deltas share: exact, lean in what it keeps, and reproducible in what it drops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tunewise.core.errors import RunError
from tunewise.delta.dropout import dropped, new_seed
from tunewise.delta.kernels import drop, low_rank_linear

S = 0.7
# tokens, in, out: with many tokens W' is built, with few the thin products run
SHAPES = [pytest.param((2, 9, 4, 3), id="wide"), pytest.param((1, 2, 12, 16), id="thin")]


def given(shape: tuple[int, ...], bias: bool = True, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """x, W, b, A, B and d, of which W and b are frozen."""
    rows, length, width, out = shape
    make = torch.Generator().manual_seed(0)

    def randn(*size: int, grad: bool = True) -> Tensor:
        return torch.randn(*size, generator=make, dtype=torch.float64).to(dtype).requires_grad_(grad)

    b = randn(out, grad=False) if bias else None
    return {
        "x": randn(rows, length, width),
        "W": randn(out, width, grad=False),
        "b": b,
        "A": randn(2, width),
        "B": randn(out, 2),
        "d": randn(out),
    }


def plain(t: dict[str, Any], p: float = 0.0, stretched: bool = True) -> Tensor:
    """The equation, eagerly."""
    low = F.linear(F.linear(drop(t["x"], p, True), t["A"]), t["B"])
    y = F.linear(t["x"], t["W"]) + S * low
    y = y * t["d"] if stretched else y
    return y if t["b"] is None else y + t["b"]


def fused(t: dict[str, Any], p: float = 0.0, stretched: bool = True) -> Tensor:
    """The same, by hand."""
    d = t["d"] if stretched else None
    return low_rank_linear(t["x"], t["W"], t["b"], t["A"], t["B"], S, p, d)


@pytest.mark.parametrize("stretched", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_equal_the_equation(
    shape: tuple[int, ...], bias: bool, p: float, stretched: bool
) -> None:
    t = given(shape, bias)
    leaves = [t[n] for n in ("x", "A", "B", "d")[: 4 if stretched else 3]]
    results = []
    for way in (fused, plain):
        torch.manual_seed(4)
        y = way(t, p, stretched)
        signs = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, signs)])
    for mine, wanted in zip(*results, strict=True):
        torch.testing.assert_close(mine, wanted)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradcheck_with_dropout_and_magnitudes(shape: tuple[int, ...]) -> None:
    t = given(shape)

    def call(x: Tensor, A: Tensor, B: Tensor, d: Tensor) -> Tensor:
        torch.manual_seed(2)
        return low_rank_linear(x, t["W"], t["b"], A, B, S, 0.3, d)

    assert torch.autograd.gradcheck(call, tuple(t[n] for n in ("x", "A", "B", "d")))


@pytest.mark.parametrize("frozen", [("A",), ("B",), ("A", "x"), ("x",), ("d",)])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(
    shape: tuple[int, ...], p: float, frozen: tuple[str, ...]
) -> None:
    t = given(shape)
    for name in frozen:
        t[name].requires_grad_(False)
    leaves = [t[n] for n in ("x", "A", "B", "d") if n not in frozen]
    results = []
    for way in (fused, plain):
        torch.manual_seed(4)
        results.append(torch.autograd.grad(way(t, p).square().sum(), leaves))
    for mine, wanted in zip(*results, strict=True):
        torch.testing.assert_close(mine, wanted)


def kept_by(call: Any, frozen: list[Tensor]) -> list[tuple[int, ...]]:
    """Shapes of what autograd keeps beside `frozen`."""
    shapes: list[tuple[int, ...]] = []

    def pack(t: Tensor) -> Tensor:
        if not any(t.data_ptr() == f.data_ptr() for f in frozen):
            shapes.append(tuple(t.shape))
        return t.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return shapes


def test_only_the_input_is_kept_and_with_dropout_a_seed() -> None:
    t = given((2, 9, 6, 5))
    parameters = [t[n] for n in ("W", "b", "A", "B", "d")]
    assert kept_by(lambda: fused(t, stretched=False), parameters) == [(2, 9, 6)]
    assert kept_by(lambda: fused(t, 0.3, stretched=False), parameters) == [(2, 9, 6), (2, 18), ()]
    assert kept_by(lambda: fused(t), parameters) == [(2, 9, 6), (18, 5)]
    t["A"].requires_grad_(False)
    assert kept_by(lambda: fused(t, stretched=False), parameters) == [(2, 18)]


def test_layers_under_autocast_share_one_kept_input() -> None:
    t = given((2, 9, 6, 6), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = fused(t)
        assert y.dtype is torch.bfloat16
        shapes = kept_by(lambda: fused(t), [t["x"], *(t[n] for n in ("W", "b", "A", "B", "d"))])
    assert shapes == [(2, 18), (18, 6)]  # x itself is among the known ones, no copy of it or of W
    y.float().square().sum().backward()
    assert all(t[n].grad.dtype is torch.float32 for n in ("x", "A", "B", "d"))


def test_a_small_change_survives_half_precision() -> None:
    """W + s B A would round it away: bfloat16 has 8 bits."""
    t = given((4, 40, 6, 6), dtype=torch.bfloat16)
    with torch.no_grad():
        t["W"].fill_(1.0)
        t["A"].fill_(1e-2)
        t["B"].fill_(1e-2)
        t["x"].fill_(1.0)
        change = low_rank_linear(t["x"], t["W"] * 0, None, t["A"], t["B"], 1.0)
        whole = low_rank_linear(t["x"], t["W"] - 1, None, t["A"], t["B"], 1.0)
        big = low_rank_linear(t["x"] - 0.99, t["W"], None, t["A"], t["B"], 1.0)
        base = F.linear(t["x"] - 0.99, t["W"])
    assert change.abs().min() > 0 and torch.equal(change, whole)
    torch.testing.assert_close((big - base).float(), base.float() * 2e-4, rtol=0.6, atol=4e-4)


def test_a_magnitude_of_zero_gives_no_nan() -> None:
    t = given((2, 9, 4, 3))
    with torch.no_grad():
        t["d"][1] = 0.0
    fused(t).square().sum().backward()
    assert all(torch.isfinite(t[n].grad).all() for n in ("x", "A", "B", "d"))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_second_derivative_raises(p: float) -> None:
    t = given((2, 9, 4, 3))
    with pytest.raises(RunError, match="no second derivative: attach with plain=True"):
        torch.autograd.grad(fused(t, p).square().sum(), [t["A"]], create_graph=True)


def test_a_base_of_another_precision_is_refused_as_by_a_plain_layer() -> None:
    t = given((2, 9, 4, 3))
    with pytest.raises(RuntimeError, match="dtype"):
        low_rank_linear(t["x"], t["W"].float(), None, t["A"], t["B"], S)


def test_gradient_checkpointing_draws_the_mask_again() -> None:
    t = given((2, 9, 4, 3))
    results = []
    for way in (fused, lambda t, p: checkpoint(fused, t, p, use_reentrant=False)):
        torch.manual_seed(4)
        y = way(t, 0.5)
        torch.randn(3)  # the draw of another layer between the two passes
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [t["x"], t["A"]])])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("p", [1e-3, 0.1, 0.5, 0.9])
def test_entries_are_dropped_with_probability_p_independently(p: float) -> None:
    torch.manual_seed(0)
    n = 400_000
    masks = []
    for _ in range(2):
        where = dropped(new_seed(torch.device("cpu")), n, p)
        inside = where[where < n]
        assert len(inside) < len(where) and bool((inside[1:] > inside[:-1]).all())
        masks.append(torch.zeros(n).index_fill_(0, inside, 1.0))
    first, second = masks
    spread = 4 * (p * (1 - p) / n) ** 0.5
    assert abs(float(first.mean()) - p) < spread
    for lag in (1, 2, 7, 128):
        assert abs(float((first[lag:] * first[:-lag]).mean()) - p * p) < spread
    assert abs(float((first * second).mean()) - p * p) < spread
    rows = first.view(-1, 100).sum(1)  # as scattered as independent draws are
    assert 0.9 < float(rows.var()) / float(rows.mean() * (1 - p)) < 1.1


def test_dropout_keeps_the_mean_and_is_a_function_of_the_global_generator() -> None:
    x = torch.ones(500, 400)
    torch.manual_seed(1)
    first, state = drop(x, 0.25, True), torch.get_rng_state()
    second = drop(x, 0.25, True)
    assert abs(float(first.mean()) - 1) < 5e-3 and not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(drop(x, 0.25, True), second)
    assert drop(x, 0.25, False) is x and drop(x, 0.0, True) is x


def test_dropout_has_second_derivatives() -> None:
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return drop(x.T, 0.5, True) ** 3  # not contiguous

    assert torch.autograd.gradcheck(call, x) and torch.autograd.gradgradcheck(call, x)


def test_dropout_compiles_in_one_graph() -> None:
    x = torch.randn(6, 5)
    compiled = torch.compile(lambda x: drop(x, 0.5, True), backend="eager", fullgraph=True)
    torch.manual_seed(3)
    wanted = drop(x, 0.5, True)
    torch.manual_seed(3)
    assert torch.equal(compiled(x), wanted)
