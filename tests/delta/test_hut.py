"""HUT: every weight is scaled by its own factor."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.delta.small import attached, change_of, inputs, pair
from tunewise.delta.hut import HUT
from tunewise.delta.lora import LoRA


def test_zeros_of_the_weight_stay_zero() -> None:
    model = pair()
    zero = torch.rand(8, 12, generator=torch.Generator().manual_seed(3)) < 0.5
    with torch.no_grad():
        model[0].weight[zero] = 0.0
    _, handle = attached(HUT(rank=2), model, move=0.5)
    handle.merge()
    assert torch.equal(model[0].weight == 0, zero)


def test_on_a_weight_of_ones_it_is_lora() -> None:
    model, other = pair(), pair()
    for one in (model, other):
        torch.nn.init.ones_(one[0].weight)
        torch.nn.init.ones_(one[1].weight)
    attached(HUT(rank=2, alpha=3.0), model, move=0.3)
    attached(LoRA(rank=2, alpha=3.0), other, move=0.3)
    torch.testing.assert_close(model(inputs()), other(inputs()))


def test_rank_one_is_a_scaled_product_of_scaled_inputs() -> None:
    model, handle = attached(HUT(rank=1, alpha=2.0), move=0.4)
    base, x = pair()[0], inputs()
    a, b = (handle.tensors()[f"0.hut.{n}"].tensor.detach() for n in "AB")
    wanted = base(x) + 2.0 * b[:, 0] * F.linear(a[0] * x, base.weight)
    torch.testing.assert_close(model[0](x), wanted)
    torch.testing.assert_close(change_of(handle), base.weight.detach() * 2.0 * b * a)


def test_fused_gradients_equal_the_plain_ones() -> None:
    grads = []
    for plain in (False, True):
        model, handle = attached(HUT(rank=2), move=0.3, plain=plain)
        model(inputs()).square().sum().backward()
        grads.append([p.grad for p in handle.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


def test_half_precision_keeps_a_change_that_depends_on_the_weight() -> None:
    model, _ = attached(HUT(rank=2), move=0.5)
    wanted = model(inputs()).detach()
    found = model.bfloat16()(inputs().bfloat16()).float()
    assert float((wanted - pair()(inputs()).detach()).abs().max()) > 0.2
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)
