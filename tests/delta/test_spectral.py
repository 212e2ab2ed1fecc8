"""FourierFT and LoCA: transforms against explicit sums, adjoints, places, location gradients, schedule."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.delta.box import Box
from tests.models import tiny
from tunewise.core.errors import RunError, UserError
from tunewise.core.handle import attach
from tunewise.core.run import Run
from tunewise.delta.spectral import FourierFT, LoCA, cosine_part, dct, idct, place

SHAPES = [(5, 7), (6, 8), (1, 4), (4, 1), (2, 2), (9, 6)]


def cosines(n: int) -> Tensor:
    k, t = torch.meshgrid(torch.arange(n).double(), torch.arange(n).double(), indexing="ij")
    made = math.sqrt(2 / n) * torch.cos(math.pi * (2 * t + 1) * k / (2 * n))
    made[0] /= math.sqrt(2)
    return made


@pytest.mark.parametrize("shape", SHAPES)
def test_transforms_are_their_sums(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    left, right = cosines(shape[0]), cosines(shape[1])
    torch.testing.assert_close(left @ left.T, torch.eye(shape[0], dtype=torch.float64))
    torch.testing.assert_close(dct(x), left @ x @ right.T)
    torch.testing.assert_close(idct(x), left.T @ x @ right)
    torch.testing.assert_close(cosine_part(x), torch.fft.ifft2(x).real)


@pytest.mark.parametrize("which", [dct, idct, cosine_part])
@pytest.mark.parametrize("shape", [(5, 4), (4, 3)])
def test_gradients_of_transforms(which: Any, shape: tuple[int, int]) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(which, (x,))
    assert torch.autograd.gradgradcheck(lambda x: which(x).square(), (x,))


def test_adjoint_identities() -> None:
    F, G = torch.randn(2, 6, 9, dtype=torch.float64)
    torch.testing.assert_close((G * idct(F)).sum(), (dct(G) * F).sum())
    torch.testing.assert_close((G * cosine_part(F)).sum(), (cosine_part(G) * F).sum())


def test_per_sample_gradients_of_transforms() -> None:
    batch = torch.randn(3, 4, 6, dtype=torch.float64)
    each = torch.func.vmap(torch.func.grad(lambda x: idct(x).pow(3).sum()))(batch)
    for x, found in zip(batch, each, strict=True):
        x = x.clone().requires_grad_()
        torch.testing.assert_close(found, torch.autograd.grad(idct(x).pow(3).sum(), x)[0])


def _linear(delta: Any, shape: tuple[int, int] = (12, 10)) -> tuple[nn.Module, Any]:
    model = Box(shape[1], shape[0])
    return model, attach(model, delta, seed=0)


def test_fourier_change_and_gradient() -> None:
    model, handle = _linear(FourierFT(frequencies=6, scale=30.0, sites="linear"))
    t = handle.sites[0][2]
    where = t.shared.places_12x10
    with torch.no_grad():
        t.coefficients.normal_()
    grid = torch.meshgrid(torch.arange(12.0), torch.arange(10.0), indexing="ij")
    expected = sum(
        c * torch.cos(2 * math.pi * (u * grid[0] / 12 + v * grid[1] / 10))
        for c, (u, v) in zip(t.coefficients.detach(), where.T, strict=True)
    )
    torch.testing.assert_close(handle.materialize()["inner"], expected * 30 / 120, rtol=1e-4, atol=1e-5)
    x, signs = torch.randn(4, 10), torch.randn(4, 12)
    (model(x) * signs).sum().backward()
    spectrum = torch.fft.fft2(signs.T @ x).real * 30 / 120
    torch.testing.assert_close(t.coefficients.grad, spectrum[where[0], where[1]], rtol=1e-4, atol=1e-5)


def test_one_coefficient_at_zero_frequency_is_a_constant() -> None:
    spectrum = torch.zeros(6, 4)
    spectrum[0, 0] = 3.0
    torch.testing.assert_close(cosine_part(spectrum), torch.full((6, 4), 3.0 / 24))


def test_small_weights_have_all_places() -> None:
    _, handle = _linear(FourierFT(sites="linear"))
    assert handle.trainable == 120
    places = handle.sites[0][2].shared.places_12x10
    assert len({tuple(p) for p in places.T.tolist()}) == 120
    assert not [n for n in handle.state() if "places" in n]


def test_every_change_can_be_reached_by_the_cosines() -> None:
    target = torch.randn(4, 5, dtype=torch.float64)
    i, j = torch.meshgrid(torch.arange(4), torch.arange(5), indexing="ij")
    z = torch.stack([i.flatten() / 3, j.flatten() / 4]).double().clamp(max=0.999)
    spectrum = place(dct(target).flatten(), z, 4, 5)
    torch.testing.assert_close(idct(spectrum), target)


def test_equal_places_add_up() -> None:
    z = torch.tensor([[0.5, 0.5], [0.0, 0.0]], dtype=torch.float64)
    a = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    found = place(a, z, 5, 3)
    assert float(found[2, 0]) == 3.0 and float(found.sum()) == 3.0
    assert torch.autograd.gradcheck(lambda a: place(a, z, 5, 3), (a,))


def test_locations_follow_the_central_difference() -> None:
    z = torch.tensor([[0.5, 0.0, 2.0], [0.5, 0.999, 0.1]], requires_grad=True)
    a = torch.tensor([0.3, -0.2, 1.0])
    g = torch.randn(7, 9)
    (place(a, z, 7, 9) * g).sum().backward()
    assert z.grad is not None
    inner = 0.5 * 0.3 * torch.stack([g[4, 4] - g[2, 4], g[3, 5] - g[3, 3]])
    torch.testing.assert_close(z.grad[:, 0], inner.clamp(-1, 1) * torch.tensor([6.0, 8.0]))
    edge = 0.5 * -0.2 * torch.stack([g[1, 8] - g[0, 8], g[0, 8] - g[0, 7]])
    torch.testing.assert_close(z.grad[:, 1], edge.clamp(-1, 1) * torch.tensor([6.0, 8.0]))
    assert float(z.grad[0, 2]) == 0.0  # outside of [0, 0.999]
    with pytest.raises(RunError, match="no second derivative"):
        torch.autograd.grad((place(a, z, 7, 9) * g).sum(), z, create_graph=True)


def test_a_location_moves_towards_the_target() -> None:
    wanted = torch.zeros(16, 16)
    wanted[5, 5] = 1.0
    z = torch.tensor([[6.0], [5.0]]) / 15
    z.requires_grad_()
    optimizer = torch.optim.SGD([z], 1e-3)
    for _ in range(100):
        optimizer.zero_grad()
        (idct(place(torch.ones(1), z, 16, 16)) - idct(wanted)).square().sum().backward()
        optimizer.step()
    assert (z.detach() * 15).round().flatten().tolist() == [5.0, 5.0]


def test_only_one_kind_of_tensor_moves_in_each_phase() -> None:
    model, handle = _linear(
        LoCA(frequencies=8, coefficient_span=2, location_span=3, location_steps=6, sites="linear")
    )
    run = Run(handle)
    optimizer = torch.optim.AdamW(handle.parameters(), lr=0.05)
    handle.run = run
    handle.watch(optimizer)
    t = handle.sites[0][2]
    moved = []
    x, y = torch.randn(20, 10), torch.randn(20, 12)
    for _ in range(9):
        before = [t.coefficients.detach().clone(), t.locations.detach().clone()]
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        moved.append(
            "".join(
                letter
                for letter, old, new in zip("al", before, (t.coefficients, t.locations), strict=True)
                if not torch.equal(old, new)
            )
        )
    assert moved == ["a", "a", "l", "l", "l", "a", "a", "a", "a"]


@pytest.mark.parametrize(
    ("total", "ends"), [(0, 30), (1000, 100), (100, 30), (40, 20), (10_000, 1000), (2, 1)]
)
def test_locations_end_by_the_rule(total: int, ends: int) -> None:
    part = LoCA()
    assert all(part.trained(step, total) == "coefficients" for step in range(ends, 2 * ends + 50))
    assert [part.trained(s, total) for s in range(10, min(ends, 30))] == ["locations"] * (min(ends, 30) - 10)
    assert {part.trained(s, total) for s in range(min(10, ends))} == {"coefficients"}


def test_half_precision_locations_are_refused() -> None:
    model = tiny("llama")
    with pytest.raises(UserError, match=r"attach with dtype=torch\.float32"):
        attach(model, "loca", dtype=torch.bfloat16)
    attach(model, "lora").detach()
