"""Weight mixup: trained and pretrained weights in shares between 0 and 1."""

from __future__ import annotations

import pytest
import torch

from tests.delta.small import attached, change_of, inputs, pair
from tunewise.core.run import Run
from tunewise.delta.mixup import LooseMixup, WeightMixup


def test_with_equal_weights_any_share_is_the_base() -> None:
    model, handle = attached(WeightMixup())
    with torch.no_grad():
        for name, info in handle.tensors().items():
            if not name.endswith("T"):
                info.tensor.uniform_(0, 1)
    assert torch.equal(model(inputs()), pair()(inputs()))


@pytest.mark.parametrize("kind", [WeightMixup, LooseMixup])
def test_shares_of_one_train_the_weight_and_of_zero_leave_it(kind: type[WeightMixup]) -> None:
    _, handle = attached(kind(spread=0.0))
    t = handle.sites[0][2]
    with torch.no_grad():
        t.T.add_(1.0)
    torch.testing.assert_close(change_of(handle), torch.ones(8, 12))
    with torch.no_grad():
        t.u.zero_()
        if kind is LooseMixup:  # its shares need both to be 0
            t.v.zero_()
    assert torch.equal(change_of(handle), torch.zeros(8, 12))


def test_the_loose_form_is_the_publications_code() -> None:
    _, handle = attached(LooseMixup(), move=0.2)
    t, W = handle.sites[0][2], pair()[0].weight.detach()
    wanted = (t.u @ t.v) * t.T + ((1 - t.u) @ (1 - t.v)) * W
    torch.testing.assert_close(W + change_of(handle), wanted.detach())


def test_shares_are_clamped_at_the_start_and_after_every_step() -> None:
    model, handle = attached(WeightMixup(spread=0.5))
    shares = [i.tensor for n, i in handle.tensors().items() if not n.endswith("T")]
    assert all(bool(((s >= 0) & (s <= 1)).all()) for s in shares)
    assert min(float(s.min()) for s in shares) < 0.9
    run = Run(handle)
    with torch.no_grad():
        for s in shares:
            s.copy_(torch.linspace(-1, 2, s.numel()).view_as(s))
    run.fire("after_step")
    assert all(float(s.min()) == 0 and float(s.max()) == 1 for s in shares)


def test_own_loop_clamps_through_watch() -> None:
    model, handle = attached(WeightMixup(spread=0.5), move=0.2)
    optimizer = torch.optim.SGD(handle.parameters(), lr=10.0)
    handle.watch(optimizer)
    model(inputs()).square().sum().backward()
    optimizer.step()
    t = handle.sites[0][2]
    assert bool(((t.u >= 0) & (t.u <= 1)).all()) and float(t.T.detach().abs().max()) > 1
