"""LoKr: both forms are the Kronecker product, and the cheaper one runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tunewise.core.errors import UserError
from tunewise.core.forward import forward_of
from tunewise.core.handle import attach
from tunewise.delta import lokr
from tunewise.delta.lokr import LoKr, factors


def test_factors() -> None:
    assert factors(384) == (16, 24)
    assert factors(13) == (1, 13)
    assert factors(128, 4) == (4, 32)
    assert factors(30, 4) == (3, 10)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (7, 16)])
def test_thin_and_dense_are_the_kronecker_product(shape: tuple[int, int]) -> None:
    model = nn.Sequential(nn.Linear(shape[1], shape[0]))
    handle = attach(model, LoKr(rank=1, alpha=3.0, decompose_both=True, sites="linear"))
    t = handle.sites[0][2]
    with torch.no_grad():
        for p in handle.parameters():
            p.normal_()
    whole = [t.w1 if "w1" in t.meta else t.w1_a @ t.w1_b, t.w2 if "w2" in t.meta else t.w2_a @ t.w2_b]
    expected = 3.0 * torch.kron(*whole)
    torch.testing.assert_close(handle.materialize()["0"], expected, rtol=1e-4, atol=1e-5)
    x = torch.randn(5, shape[1])
    wanted = x @ (model[0].weight + expected).T + model[0].bias
    zero = torch.zeros(5, shape[0])
    torch.testing.assert_close(t.part.output(t, x, zero), x @ expected.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("width", "tokens", "thin"), [(64, 512, False), (64, 2, True), (1024, 512, True)])
def test_the_cheaper_form_runs(width: int, tokens: int, thin: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    for name in ("beside_linear", "changed_linear"):
        monkeypatch.setattr(lokr, name, lambda f, x, *_, name=name: ran.append(name) or x)
    model = nn.Sequential(nn.Linear(width, width))
    attach(model, LoKr(sites="linear"))
    stand_in = forward_of(model[0])
    assert stand_in is not None and stand_in.plan.product is not None
    model(torch.zeros(tokens, width))
    assert ran == ["beside_linear" if thin else "changed_linear"]


@pytest.mark.parametrize("start", ["w1", "lycoris"])
def test_both_starts_change_nothing_and_learn(start: str) -> None:
    model = nn.Sequential(nn.Linear(12, 20))
    x = torch.randn(3, 12)
    base = model(x)
    handle = attach(model, LoKr(rank=1, decompose_both=True, start=start, sites="linear"))  # type: ignore[arg-type]
    torch.testing.assert_close(model(x), base)
    model(x).square().sum().backward()
    assert sum(bool(p.grad is not None and p.grad.any()) for p in handle.parameters()) == 1
    zero = [n.rpartition(".")[2] for n, i in handle.tensors().items() if not i.tensor.any()]
    assert zero == (["w1_a"] if start == "w1" else ["w2_b"])


def test_a_factor_of_zero_is_refused() -> None:
    with pytest.raises(UserError, match="factor=0 is no size"):
        attach(nn.Sequential(nn.Linear(4, 4)), LoKr(factor=0, sites="linear"))
