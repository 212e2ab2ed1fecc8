"""The schedule of the learning rate: warmup, a constant stretch, decay."""

from __future__ import annotations

import pytest

from tunewise.core.errors import UserError
from tunewise.loop.settings import Settings


def test_decay_may_begin_late() -> None:
    settings = Settings.of(lr=1.0, warmup_steps=2, decay_from=6)
    factors = [settings.factor(step, 10) for step in range(10)]
    assert factors[:2] == [pytest.approx(1 / 3), pytest.approx(2 / 3)]
    assert factors[2:7] == [1.0] * 5
    assert factors[7:] == [pytest.approx(0.75), pytest.approx(0.5), pytest.approx(0.25)]


def test_a_longer_run_has_the_same_start() -> None:
    short = Settings.of(lr=1.0, warmup_steps=3, schedule="constant")
    long = Settings.of(lr=1.0, warmup_steps=3, decay_from=12)
    assert [short.factor(s, 6) for s in range(6)] == [long.factor(s, 30) for s in range(6)]


def test_without_them_it_is_what_it_was() -> None:
    settings = Settings.of(lr=1.0, warmup=0.2)
    assert settings.factor(0, 10) == pytest.approx(1 / 3)
    assert settings.factor(2, 10) == 1.0 and settings.factor(6, 10) == pytest.approx(0.5)
    with pytest.raises(UserError, match="decay_from"):
        Settings.of(decay_from=-1)
