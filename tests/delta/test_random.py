"""Seeded draws are the same every time and leave the global random state alone."""

from __future__ import annotations

import torch

from tunewise.delta.random import generator, kaiming, positions


def test_positions_are_distinct_seeded_and_inside() -> None:
    state = torch.get_rng_state()
    found = positions(5, 7, 20, seed=3)
    assert torch.equal(found, positions(5, 7, 20, seed=3))
    assert not torch.equal(found, positions(5, 7, 20, seed=4))
    assert len({tuple(p) for p in found.T.tolist()}) == 20
    assert found.min() >= 0 and found[0].max() < 5 and found[1].max() < 7
    assert positions(2, 3, 100, seed=0).shape == (2, 6)
    assert torch.equal(state, torch.get_rng_state())


def test_kaiming_has_torchs_bounds() -> None:
    value = kaiming(400, 25, make=generator(1))
    assert torch.equal(value, kaiming(400, 25, make=generator(1)))
    assert 0.199 < float(value.abs().max()) <= 0.2
    wide = kaiming(400, 25, gain=2**0.5, make=generator(1))
    torch.testing.assert_close(wide.var(), torch.tensor(2 / 25), rtol=0.05, atol=0)
