"""Moderated variances: alike methods share, one alone keeps its own, a wild one stays by itself."""

from __future__ import annotations

import numpy as np
import pytest

from tunewise.study.judge.seed_noise import Spread, moderated


def freedom(noise: object) -> float:
    return 1 / (noise.own + noise.shared)  # type: ignore[attr-defined]


def test_a_method_alone_keeps_its_own_variance() -> None:
    (noise,) = moderated([Spread(3, 0.04, 0.01)])
    assert noise.variance == pytest.approx(0.01) and noise.size == pytest.approx(0.04 / 3)
    assert freedom(noise) == pytest.approx(2) and noise.source == "measured"


def test_one_seed_borrows_and_nothing_is_made_up() -> None:
    one, two, fixed = moderated([Spread(1), Spread(3, 0.04, 0.01), Spread(1, fixed=True)])
    assert one.source == "lent" and one.variance == pytest.approx(0.03) and freedom(one) == pytest.approx(2)
    assert fixed.source == "none" and fixed.variance == 0
    assert [n.source for n in moderated([Spread(1), Spread(1)])] == ["unknown"] * 2
    same, lent = moderated([Spread(3), Spread(1)])
    assert (same.source, lent.source) == ("none", "unknown"), "seeds without a difference are no example"


def test_equal_variances_are_shared() -> None:
    found = moderated([Spread(3, 2e-5 * x, 4e-6) for x in np.linspace(0.5, 1.5, 20)])
    assert all(freedom(n) > 8 for n in found)
    least, most = found[0].variance, found[-1].variance
    assert 1 < most / least < 1.8 < (1.5 - 0.2) / (0.5 - 0.2)
    assert np.mean([3 * n.variance for n in found]) == pytest.approx(1.6e-5, rel=0.1)


def test_variances_that_differ_are_kept_apart() -> None:
    found = moderated([Spread(20, 4.0**k) for k in range(-4, 5)])
    for k, noise in zip(range(-4, 5), found, strict=True):
        assert 20 * noise.variance == pytest.approx(4.0**k, rel=0.6)


def test_wild_methods_neither_lend_nor_borrow() -> None:
    usual = [Spread(3, 2e-5 * x) for x in (0.6, 0.8, 1, 1.2, 1.4, 1.0)]
    wild = [Spread(3, 0.02), Spread(2, 0.03)]
    alone, together = moderated(usual), moderated([*usual, *wild])
    assert together[:6] == alone
    assert [n.size for n in together[6:]] == pytest.approx([0.02 / 3, 0.03 / 2])
    assert [freedom(n) for n in together[6:]] == pytest.approx([2, 1])


def test_rows_explain_more_than_there_is() -> None:
    """Between few seeds the variance is often below that which rows explain: then seeds add next to nothing."""
    found = moderated([Spread(3, 1e-5 * x, 2e-5) for x in (0.1, 0.4, 0.0, 0.8, 0.3)])
    assert all(0 <= n.variance < 1e-5 / 3 and np.isfinite(freedom(n)) for n in found)
