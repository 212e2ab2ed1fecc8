"""Weight compander: bounds, starts, derivative and the limit of a large b."""

from __future__ import annotations

import math

import pytest
import torch

from tests.conformance import forward_checks, keeping_checks
from tests.conformance.support import Case
from tests.delta.small import attached, change_of, inputs, pair
from tunewise.catalog.lowrank.weight_compander import weight_compander
from tunewise.delta.compander import CompandedChange, Compander


def test_step_0_is_the_base_to_rounding() -> None:
    model, _ = attached(Compander())
    torch.testing.assert_close(model(inputs()), pair()(inputs()), rtol=1e-5, atol=1e-6)
    model, _ = attached(CompandedChange())
    assert torch.equal(model(inputs()), pair()(inputs()))


@pytest.mark.parametrize("kind", [Compander, CompandedChange])
def test_nothing_grows_beyond_the_bound(kind: type[Compander]) -> None:
    _, handle = attached(kind(), move=1000.0)
    W = pair()[0].weight.detach()
    bound = (
        handle.state()["0." + ("compander" if kind is Compander else "companded_change") + ".a"] * math.pi / 2
    )
    torch.testing.assert_close(bound, 1.05 * W.abs().max())
    grown = change_of(handle) + (W if kind is Compander else 0)
    assert float(grown.abs().max()) <= float(bound) * (1 + 1e-5)
    assert float(grown.abs().min()) > 0.5 * float(bound)


def test_the_gradient_of_v_is_the_slope_times_that_of_the_weight() -> None:
    model, handle = attached(Compander(slope=2.0), move=0.2)
    t = handle.sites[0][2]
    plain = pair()[0]
    with torch.no_grad():
        plain.weight.copy_(plain.weight + change_of(handle))
    model[0](inputs()).square().sum().backward()
    plain(inputs()).square().sum().backward()
    slope = (t.a / t.b) / (1 + (t.v / t.b) ** 2)
    torch.testing.assert_close(t.v.grad, (plain.weight.grad * slope).detach(), rtol=1e-4, atol=1e-5)


def test_a_large_b_gives_the_linear_map() -> None:
    _, handle = attached(CompandedChange(), move=0.1)
    t = handle.sites[0][2]
    t.b.fill_(1e4)
    t.a.fill_(2e4)
    torch.testing.assert_close(change_of(handle), 2 * t.v.detach(), rtol=1e-4, atol=1e-6)


def test_learned_parameters_are_two_more_per_site() -> None:
    assert attached(Compander(learned=True))[1].trainable == attached(Compander())[1].trainable + 4


CHECKS = ["check_identity", "check_gradients", "check_count", "check_merge", "check_detach"]


@pytest.mark.parametrize("check", CHECKS)
def test_companded_changes_keep_the_promises(check: str) -> None:
    case = Case("weight_compander", lambda: weight_compander(change=True, learned=True), "llama")
    (getattr(forward_checks, check, None) or getattr(keeping_checks, check))(case)
