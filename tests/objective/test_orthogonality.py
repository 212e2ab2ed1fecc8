"""The regulariser of orthonormal directions: its value, its gradient, its share of a micro-batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.conformance.support import Case
from tests.conformance.training_checks import start, training_run
from tunewise.core.errors import UserError
from tunewise.core.handle import attach
from tunewise.core.method import read_recipe
from tunewise.core.run import Run
from tunewise.delta.gated import GatedLowRank
from tunewise.objective.orthogonality import Orthogonality, off_orthonormal


def _loss(run: Run, units: float = 4.0) -> Any:
    batch = SimpleNamespace(units=torch.ones(4))
    return Orthogonality().loss(run, batch, torch.empty(0), None, units)


def test_it_is_the_mean_of_unsquared_norms() -> None:
    handle = attach(nn.Sequential(nn.Linear(8, 6)), GatedLowRank(rank=2, start="gates"), seed=0)
    t: Any = handle.sites[0][2]
    with torch.no_grad():
        t.A.zero_()
        t.B.zero_()
        t.A[0, 0], t.B[0, 0] = 3.0, 1.0
    run = Run(handle)
    wanted = ((64.0 + 1.0) ** 0.5 + 1.0) / 2
    torch.testing.assert_close(_loss(run), torch.tensor(wanted))
    torch.testing.assert_close(_loss(run, units=8.0), torch.tensor(wanted / 2))
    _loss(run).backward()
    assert t.A.grad.isfinite().all() and t.g.grad is None


def test_it_is_nothing_at_an_orthonormal_start_and_has_a_gradient_there() -> None:
    M = torch.eye(5)[:3].clone().requires_grad_()
    value = off_orthonormal(M, 0)
    value.backward()
    assert float(value) < 1e-5 and M.grad is not None and not M.grad.any()
    handle = attach(nn.Sequential(nn.Linear(8, 6)), GatedLowRank(rank=2, start="svd"))
    assert float(_loss(Run(handle))) < 1e-4


def test_experts_are_kept_orthonormal_one_by_one() -> None:
    M = torch.stack([torch.eye(4)[:2], 2 * torch.eye(4)[:2]])
    torch.testing.assert_close(off_orthonormal(M, 1), torch.tensor((0.0 + 18.0**0.5) / 2), rtol=0, atol=1e-5)
    torch.testing.assert_close(off_orthonormal(M.mT, 2), off_orthonormal(M, 1))


def test_a_large_weight_keeps_the_directions_orthonormal() -> None:
    far = []
    for weight in (0.0, 5.0):
        recipe = read_recipe(f"sorsa(rank=4, orthogonality={weight})")
        run = training_run(Case("sorsa", recipe.fresh, "roberta", lr=1e-3), steps=12)
        start(run)
        far.append(float(_loss(run)))
    assert far[1] < 0.5 * far[0]


def test_without_directions_it_is_refused() -> None:
    handle = attach(nn.Sequential(nn.Linear(8, 6)), "bias_scale")
    with pytest.raises(UserError, match="needs a low-rank delta"):
        _loss(Run(handle))
