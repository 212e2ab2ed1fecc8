"""Starts from rows: what is seen, what is found, when it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tunewise as tw
from tests.models import tiny, tiny_batch
from tunewise.core.errors import UserError
from tunewise.core.handle import Handle, attach, restore
from tunewise.delta.lora import LoRA
from tunewise.init.base import site_weight
from tunewise.init.collect import Components, Covariance
from tunewise.init.corda import CorDA, damped
from tunewise.init.eva import EVA
from tunewise.init.svd import top_svd


class Net(nn.Module):
    """Two layers that share an input, and one behind them; `x` [rows, places, 16]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.out = nn.Linear(16, 12), nn.Linear(16, 10), nn.Linear(12, 8)

    def forward(self, x: Tensor, attention_mask: Any = None, labels: Any = None) -> Tensor:
        return self.out(torch.tanh(self.q(x))) + self.k(x)[..., :8]


def _rows(n: int = 4, seed: int = 0) -> list[dict[str, Tensor]]:
    make = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -1.5, 16)
    return [{"x": torch.randn(8, 6, 16, generator=make) * scale} for _ in range(n)]


def _ts(handle: Handle) -> dict[str, Any]:
    return {site.name: t for _, site, t in handle.sites}


def test_incremental_components_are_those_of_all_rows() -> None:
    rows = torch.cat([b["x"].reshape(-1, 16) for b in _rows()]) + 3.0
    found = Components(5)
    for part in rows.split([3, 40, 50, 99]):  # three rows wait for more
        found.add(part)
    u, s, v = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    assert found.seen == len(rows)
    torch.testing.assert_close((found.components * v[:5]).sum(1).abs(), torch.ones(5), rtol=0, atol=0.05)
    whole = (s**2 / (s**2).sum())[:5].double()
    torch.testing.assert_close(found.ratios, whole, rtol=0.02, atol=1e-3)
    exact = Components(16)
    for part in rows.split(60):
        exact.add(part)
    torch.testing.assert_close(exact.ratios, (s**2 / (s**2).sum()).double(), rtol=1e-3, atol=1e-5)


def test_eva_starts_orthonormal_at_the_inputs_and_shares_out_the_ranks() -> None:
    model, rows = Net(), _rows()
    before = model(**rows[0])
    handle = attach(model, LoRA(rank=4, alpha=8.0, init=EVA()))
    facts = tw.calibrate(handle, rows)
    ts = _ts(handle)
    assert facts["unconverged"] == 0 and sum(len(t.A) for t in ts.values()) == 12
    assert len({len(t.A) for t in ts.values()}) > 1
    for t in ts.values():
        torch.testing.assert_close(t.A @ t.A.T, torch.eye(len(t.A)), rtol=0, atol=1e-4)
        assert t.B.shape[1] == len(t.A) and t.part.s == 2.0
    assert torch.equal(model(**rows[0]), before)
    short = min(len(ts["q"].A), len(ts["k"].A))  # the same input, so the same directions
    assert torch.equal(ts["q"].A[:short], ts["k"].A[:short])
    assert len({p.data_ptr() for p in handle.parameters()}) == 6 and all(
        p.is_contiguous() for p in handle.parameters()
    )


def test_rho_one_keeps_the_ranks_and_a_subspace_is_covered() -> None:
    model, make = Net(), torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(16, 3, generator=make)).Q
    rows = [{"x": torch.randn(8, 6, 3, generator=make) @ basis.T} for _ in range(3)]
    handle = attach(model, LoRA(rank=3, init=EVA(rho=1.0), sites="q | k"))
    tw.calibrate(handle, rows)
    for t in _ts(handle).values():
        assert len(t.A) == 3
        torch.testing.assert_close(t.A.T @ t.A, basis @ basis.T, rtol=0, atol=1e-3)


def test_a_layer_of_rank_zero_stays_untouched_and_is_saved(tmp_path: Path) -> None:
    class Flat(Net):
        def forward(self, x: Tensor, attention_mask: Any = None, labels: Any = None) -> Tensor:
            return self.out(torch.tanh(self.q(x[..., :1] * torch.ones(16)))) + self.k(x)[..., :8]

    model = Flat()
    handle = attach(model, LoRA(rank=1, alpha=4.0, init=EVA(rho=3.0), sites="q | k"))
    rows = [{"x": torch.randn(8, 6, 16, generator=torch.Generator().manual_seed(i))} for i in range(40)]
    tw.calibrate(handle, rows)
    found = {name: len(t.A) for name, t in _ts(handle).items()}
    assert found["q"] + found["k"] == 2
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(0.1)
    assert handle.run is not None
    handle.run.tensors.resize(f"k.{handle.sites[0][0]}", 0)
    x = rows[0]["x"]
    assert torch.equal(model.k(x), nn.functional.linear(x, model.k.weight, model.k.bias))
    wanted = model(x)
    handle.save(tmp_path)
    again = Flat()
    other = restore(again, tmp_path)
    assert torch.equal(again(x), wanted) and len(_ts(other)["k"].A) == 0


def test_padding_and_ignored_labels_are_left_out() -> None:
    rows = _rows(2)
    mask = torch.ones(8, 6, dtype=torch.long)
    mask[:, 4:] = 0
    labels = torch.zeros(8, 6, dtype=torch.long)
    labels[:, :2] = -100
    starts = []
    for masked in (True, False):
        handle = attach(Net(), LoRA(rank=3, init=CorDA(), sites="q"))
        if masked:
            noisy = [r["x"].clone() for r in rows]
            for x in noisy:
                x[:, 4:], x[:, :2] = 100.0, -50.0
            given = [{"x": x, "attention_mask": mask, "labels": labels} for x in noisy]
        else:
            given = [{"x": r["x"][:, 2:4]} for r in rows]
        tw.calibrate(handle, given)
        starts.append(_ts(handle)["q"])
    torch.testing.assert_close(starts[0].B @ starts[0].A, starts[1].B @ starts[1].A, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_keeps_w_and_weighs_by_the_inputs(mode: str) -> None:
    model, rows = Net(), _rows()
    before = model(**rows[0])
    handle = attach(model, LoRA(rank=4, alpha=4.0, init=CorDA(mode=mode)))  # type: ignore[arg-type]
    facts = tw.calibrate(handle, rows)
    assert facts["calibration_rows"] == 32
    assert torch.equal(model(**rows[0]), before)
    c, site, t = Covariance(), handle.sites[0][1], _ts(handle)["q"]
    for batch in rows:
        c.add(batch["x"].reshape(-1, 16))
    fixed, _ = damped(c.value)
    W = site_weight(site)
    sigma = torch.linalg.svdvals(W @ fixed)
    if mode == "ipm":
        left = float(((W - t.B @ t.A) @ fixed).norm())
        assert abs(left - float(sigma[4:].norm())) < 1e-3 * float(sigma.norm())
        u, s, v = top_svd(W, 4)
        assert left < float(((W - u * s @ v) @ fixed).norm())
    else:
        found = torch.linalg.svdvals(t.B @ t.A @ fixed)[:4]
        torch.testing.assert_close(found, sigma[-4:], rtol=1e-2, atol=1e-4)


def test_corda_without_weighing_is_pissa_and_its_whole_is_w() -> None:
    W = torch.randn(10, 16, generator=torch.Generator().manual_seed(0))
    unit = Covariance()
    unit.total, unit.calls = torch.eye(16), 1
    a, b = CorDA().factors(W, 3, 2.0, unit)
    u, s, v = top_svd(W, 3)
    torch.testing.assert_close(2.0 * b @ a, u * s @ v, rtol=1e-4, atol=1e-5)
    a, b = CorDA(mode="kpm").factors(W, 10, 1.0, unit)
    torch.testing.assert_close(b @ a, W, rtol=1e-4, atol=1e-5)


def test_hooks_modes_and_gradients_are_left_as_they_were() -> None:
    model = Net().train()
    model.k.eval()
    handle = attach(model, LoRA(rank=2, init=EVA()))
    tw.calibrate(handle, _rows())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert model.training and not model.k.training
    assert all(p.grad is None for p in model.parameters()) and handle.active


def test_own_loops_must_calibrate(tmp_path: Path) -> None:
    model = tiny("llama")
    handle = attach(model, "eva(rank=2)")
    optimizer = torch.optim.SGD(handle.parameters(), 0.1)
    with pytest.raises(UserError, match="EVA starts from rows: call tw.calibrate"):
        handle.watch(optimizer)
    model(**tiny_batch("llama")).logits.sum().backward()
    handle.run = None
    with pytest.raises(UserError, match="EVA needs the event prepare and never got it"):
        handle.save(tmp_path / "no")
    tw.calibrate(handle, [dict(tiny_batch("llama")) for _ in range(2)])
    handle.watch(torch.optim.SGD(handle.parameters(), 0.1))
    handle.save(tmp_path / "yes")
    again = restore(tiny("llama"), tmp_path / "yes")  # found before it was saved
    again.watch(torch.optim.SGD(again.parameters(), 0.1))
    with pytest.raises(UserError, match="No start of this adaptation waits for rows"):
        tw.calibrate(again, [])


def test_what_cannot_be_calibrated_is_refused() -> None:
    with pytest.raises(UserError, match="got no batch of rows"):
        tw.calibrate(attach(Net(), LoRA(rank=2, init=EVA())), [])
    with pytest.raises(UserError, match="too few inputs of q"):
        tw.calibrate(attach(Net(), LoRA(rank=8, init=EVA())), iter([{"x": torch.randn(1, 2, 16)}]))
    handle = attach(tiny("llama"), LoRA(rank=2, init=CorDA(), sites="embedding"))
    with pytest.raises(
        UserError, match="reads the inputs of linear layers; model.embed_tokens is one of embedding"
    ):
        tw.calibrate(handle, [dict(tiny_batch("llama"))])
    with pytest.raises(UserError, match="has 8 directions, fewer than rank=9"):
        attach(Net(), LoRA(rank=9, init=EVA(), sites="out"))


def test_rows_that_do_not_converge_are_counted() -> None:
    handle = attach(Net(), LoRA(rank=4, init=EVA(rows=8, tau=0.999999)))
    assert tw.calibrate(handle, _rows())["unconverged"] > 0
