"""Dropout of the low-rank path: the fused product draws the same mask as its eager twin."""

import pytest
import torch
import torch.nn.functional as F

from tunewise.delta import kernels

P = 0.25


def eager(x: torch.Tensor, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    return F.linear(x, W) + 0.7 * F.linear(F.linear(kernels.drop(x, P, True), A), B)


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_value_and_gradients_equal_the_eager_twin_at_the_same_seed(tokens: int) -> None:
    torch.manual_seed(0)
    x, W = torch.randn(2, tokens, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    A, B = torch.randn(2, 6, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    weight = torch.randn(2, tokens, 5, dtype=torch.float64)
    results = []
    for fused in (True, False):
        xs = [v.clone().requires_grad_() for v in (x, A, B)]
        torch.manual_seed(7)
        y = (
            kernels.low_rank_linear(xs[0], W, None, xs[1], xs[2], 0.7, P)
            if fused
            else eager(xs[0], W, *xs[1:])
        )
        results.append([y.detach(), *torch.autograd.grad((y * weight).sum(), xs)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_the_mask_has_the_right_share_is_independent_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    x = torch.ones(1000, 400)
    first, second = kernels.drop(x, P, True), kernels.drop(x, P, True)
    assert abs(float((first == 0).float().mean()) - P) < 2e-3
    assert abs(float(((first == 0) & (second == 0)).float().mean()) - P * P) < 2e-3
    assert abs(float(first.mean()) - 1) < 5e-3
    neighbours = ((first[:, 1:] == 0) & (first[:, :-1] == 0)).float().mean()
    assert abs(float(neighbours) - P * P) < 2e-3
    assert kernels.drop(x, P, False) is x
