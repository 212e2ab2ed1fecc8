"""LoHa: rank, exact low-rank components, one product, dropout of rows."""

from __future__ import annotations

import torch
from torch import nn

from tunewise.core.handle import attach
from tunewise.delta.loha import LoHa


def _moved(**options: object) -> tuple[nn.Module, object]:
    model = nn.Sequential(nn.Linear(30, 20))
    handle = attach(model, LoHa(rank=3, alpha=6.0, sites="linear", **options))  # type: ignore[arg-type]
    with torch.no_grad():
        handle.sites[0][2].get_parameter("w2_b").normal_()
    return model, handle


def test_components_multiply_to_the_change_whose_rank_is_squared() -> None:
    _, handle = _moved()
    t = handle.sites[0][2]  # type: ignore[attr-defined]
    change = handle.materialize()["0"]  # type: ignore[attr-defined]
    b, a = t.part.components(t)
    assert b.shape == (20, 9) and a.shape == (9, 30)
    torch.testing.assert_close(b @ a, change, rtol=1e-4, atol=1e-5)
    assert int(torch.linalg.matrix_rank(change, rtol=1e-4)) == 9
    expected = 2.0 * (t.w1_a @ t.w1_b) * (t.w2_a @ t.w2_b)
    torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-5)


def test_dropped_rows_leave_the_base() -> None:
    model, handle = _moved(rank_dropout=0.5)
    x = torch.randn(4, 30)
    with handle.disabled():  # type: ignore[attr-defined]
        base = model(x)
    moved = (model.train()(x) - base).abs().amax(0)
    assert 0 < int((moved < 1e-6).sum()) < 20
    assert bool(((model.eval()(x) - base).abs().amax(0) > 1e-6).all())


def test_a_dropped_module_is_the_base() -> None:
    model, handle = _moved(module_dropout=0.999)
    x = torch.randn(4, 30)
    with handle.disabled():  # type: ignore[attr-defined]
        base = model(x)
    torch.testing.assert_close(model.train()(x), base)
