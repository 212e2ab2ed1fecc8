"""OFT: rotations are orthogonal, keep angles between neurons, and say which block sizes fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.models import tiny
from tunewise.core.errors import UserError
from tunewise.core.handle import attach
from tunewise.delta.oft import OFT, turns


def _rotation(Q: torch.Tensor, size: int, terms: int) -> torch.Tensor:
    return torch.eye(size, dtype=Q.dtype) + turns(Q, size, terms)


def test_the_exact_map_is_a_rotation() -> None:
    turned = _rotation(torch.randn(3, 28, dtype=torch.float64), 8, 0)
    torch.testing.assert_close(turned @ turned.mT, torch.eye(8, dtype=torch.float64).expand(3, 8, 8))
    torch.testing.assert_close(torch.linalg.det(turned), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("terms", [4, 5, 8])
def test_the_series_is_the_inverse_turn_up_to_its_next_power(terms: int) -> None:
    Q = torch.randn(1, 28, dtype=torch.float64) * 0.02
    exact, cut = _rotation(-Q, 8, 0), _rotation(Q, 8, terms)
    skew = torch.zeros(8, 8, dtype=torch.float64)
    skew[tuple(torch.triu_indices(8, 8, 1))] = Q[0]
    size = float(torch.linalg.matrix_norm(skew - skew.T, 2))
    far = float(torch.linalg.matrix_norm(exact - cut, 2).max())
    assert far <= 2.5 * size ** (terms - 1)
    assert far > 0.1 * size ** (terms - 1)


def test_angles_between_neurons_stay() -> None:
    model = nn.Sequential(nn.Linear(16, 10))
    handle = attach(model, OFT(block_size=8, terms=0, sites="linear"))
    with torch.no_grad():
        handle.parameters()[0].normal_()
    old = model[0].weight
    new = old + handle.materialize()["0"]
    assert float((new - old).abs().max()) > 0.1
    torch.testing.assert_close(new @ new.T, old @ old.T, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    model = nn.Sequential(nn.Linear(24, 10))
    with pytest.raises(UserError, match="block_size=7 does not divide the 24 inputs of 0; 6 and 8 do"):
        attach(model, OFT(block_size=7, sites="linear"))
    with pytest.raises(UserError, match="terms=2 is too few"):
        attach(model, OFT(block_size=8, terms=2, sites="linear"))
    with pytest.raises(UserError, match="query is only a part of its rows"):
        attach(tiny("gpt2"), OFT(block_size=8, sites="query"))
