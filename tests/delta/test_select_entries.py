"""Which entries are picked, on weights where the answer is known."""

from __future__ import annotations

import pytest
import torch

from tunewise.core.errors import UserError
from tunewise.delta import select_entries
from tunewise.delta.select_entries import Below, Budget, Decomposed, Largest, Principal, Uniform, truncated


def make(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


W = torch.randn(24, 40, generator=make(5))
ALL = [
    Uniform(share=0.1),
    Largest(rank=2),
    Principal(rank=2, kept=8),
    Decomposed(number=30),
    Below(threshold=0.2),
]


@pytest.mark.parametrize("part", ALL, ids=lambda p: type(p).__name__)
def test_positions_are_sorted_distinct_and_as_many_as_counted(part: select_entries.Entries) -> None:
    index = part.pick(W, make())
    assert index.dtype == torch.int64 and bool((index.diff() > 0).all())
    assert len(index) == part.count(W) and int(index[0]) >= 0 and int(index[-1]) < W.numel()


def test_budgets() -> None:
    assert Largest(rank=3).count(W) == 3 * (24 + 40)
    assert Largest(rank=100).count(W) == 24 * 40
    assert Largest(share=0.25).count(W) == 240
    for wrong in (Largest(), Largest(rank=1, number=1)):
        with pytest.raises(UserError, match="exactly one"):
            wrong.count(W)
    assert isinstance(Largest(), Budget)


def test_below_and_largest_are_magnitude_masks() -> None:
    small = Below(threshold=0.5).pick(W, make())
    assert bool((W.reshape(-1)[small].abs() < 0.5).all()) and len(small) == int((W.abs() < 0.5).sum())
    large = Largest(number=50).pick(W, make())
    others = torch.ones(W.numel(), dtype=torch.bool).index_fill(0, large, False)
    assert W.reshape(-1)[large].abs().min() >= W.reshape(-1)[others].abs().max()


def test_principal_of_full_rank_is_the_magnitude_mask_and_of_low_rank_is_not() -> None:
    magnitude = Largest(rank=2).pick(W, make())
    assert torch.equal(Principal(rank=2, kept=24).pick(W, make()), magnitude)
    overlap = torch.isin(Principal(rank=2, kept=4).pick(W, make()), magnitude).float().mean()
    assert 0.1 < overlap < 1.0


def test_truncation_is_the_best_one_exact_and_randomised(monkeypatch: pytest.MonkeyPatch) -> None:
    tail = torch.linalg.svdvals(W)[6:].square().sum().sqrt()
    torch.testing.assert_close((W - truncated(W, 6)).norm(), tail)
    monkeypatch.setattr(select_entries, "EXACT", 1)
    assert (W - truncated(W, 6)).norm() < 1.02 * tail


@pytest.mark.parametrize("noise", [0.0, 0.004])
def test_decomposition_finds_planted_spikes(noise: float) -> None:
    low = torch.randn(256, 5, generator=make(1)) @ torch.randn(5, 256, generator=make(2)) * 0.13
    low += noise * torch.randn(256, 256, generator=make(4))
    spikes = torch.randperm(low.numel(), generator=make(3))[:64].sort().values
    planted = low.reshape(-1).index_add(0, spikes, torch.full((64,), 0.8)).view(256, 256)
    found = {
        p: torch.isin(p(number=64).pick(planted, make()), spikes).float().mean()
        for p in (Decomposed, Largest)
    }
    assert found[Decomposed] > 0.95 and found[Largest] < 0.3


def test_decomposition_of_a_low_rank_weight_still_picks_by_a_reason() -> None:
    low = torch.randn(30, 2, generator=make(1)) @ torch.randn(2, 30, generator=make(2))
    index = Decomposed(number=10).pick(low, make())
    assert len(index) == 10 and torch.equal(index, Decomposed(number=10).pick(low, make()))


def test_uniform_is_uniform() -> None:
    counts = torch.zeros(200)
    for seed in range(400):
        counts[Uniform(number=20).pick(torch.zeros(10, 20), make(seed))] += 1
    assert float((counts - 40).abs().max()) < 4.5 * 6.0  # 400 draws with p = 0.1: sigma = 6
