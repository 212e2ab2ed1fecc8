"""NOLA: bases from seeds, in both passes, against explicit ones; counts and checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.delta.small import attached, change_of, inputs
from tunewise.core.errors import UserError
from tunewise.delta import basis
from tunewise.delta.nola import NOLA
from tunewise.init.svd import SVD

SEED = torch.tensor(7)


def explicit(count: int, size: int, seed: int = 7) -> torch.Tensor:
    """The whole basis at once, in float64."""
    make = torch.Generator().manual_seed(seed)
    return torch.empty(count, size).uniform_(-1, 1, generator=make).double()


def test_values_and_gradients_equal_the_explicit_sum() -> None:
    c = torch.randn(5, dtype=torch.double, requires_grad=True)
    g = torch.randn(9, dtype=torch.double)
    found, wanted = basis.mix_basis(c, SEED, 9), c @ explicit(5, 9) / 5**0.5
    torch.testing.assert_close(found, wanted)
    (a,), (b,) = torch.autograd.grad(found, c, g), torch.autograd.grad(wanted, c, g)
    torch.testing.assert_close(a, b)


def test_gradients_of_all_orders() -> None:
    c = torch.randn(5, dtype=torch.double, requires_grad=True)

    def curved(c: torch.Tensor) -> torch.Tensor:
        return basis.mix_basis(c, SEED, 9).square()

    assert torch.autograd.gradcheck(curved, c)
    assert torch.autograd.gradgradcheck(curved, c)


def test_chunks_change_nothing_and_nothing_of_the_basis_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    c = torch.randn(50, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
        whole = basis.mix_basis(c, SEED, 40)
    assert sum(kept) <= 1
    monkeypatch.setattr(basis, "CHUNK", 130)  # three rows at a time, the last one fewer
    found = basis.mix_basis(c, SEED, 40)
    torch.testing.assert_close(found, whole)
    (a,), (b,) = (torch.autograd.grad(y.square().sum(), c) for y in (found, whole))
    torch.testing.assert_close(a, b)


def test_the_random_state_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = basis.mix_basis(torch.ones(3), SEED, 20)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(basis.mix_basis(torch.ones(3), SEED, 20), first)


def test_a_large_basis_reaches_any_matrix() -> None:
    rows = torch.stack([basis.mix_basis(row, SEED, 12) for row in torch.eye(24)])
    assert torch.linalg.matrix_rank(rows) == 12


def test_only_beta_learns_at_step_0_and_sites_differ() -> None:
    model, handle = attached(NOLA(rank=2, basis=5))
    model(inputs()).square().sum().backward()
    grads = {n: i.tensor.grad for n, i in handle.tensors().items()}
    assert all(bool(g.any()) == n.endswith("beta") for n, g in grads.items())  # type: ignore[union-attr]
    a, b = handle.state()["0.nola.seeds"], handle.state()["1.nola.seeds"]
    assert len({*a.tolist(), *b.tolist()}) == 6


def test_a_checkpoint_holds_two_k_numbers_and_three_seeds_per_site(tmp_path: Path) -> None:
    model, handle = attached(NOLA(rank=2, basis=5), move=0.3)
    assert handle.trainable == 2 * 2 * 5
    handle.save(tmp_path)
    state = load_file(tmp_path / "adaptation.safetensors")
    assert sum(v.numel() for v in state.values()) == 2 * (2 * 5 + 3)
    other, again = attached(NOLA(rank=2, basis=5, seed=3), move=0.3)
    assert not torch.equal(change_of(again), change_of(handle))


def test_a_start_is_refused() -> None:
    with pytest.raises(UserError, match="start of its own"):
        attached(NOLA(rank=2, basis=5, init=SVD()))
