"""Budgets are read as people write them, and kept."""

from __future__ import annotations

from typing import Any

import pytest

from tunewise.core.errors import UserError
from tunewise.study.budget import Clock, parse_memory, parse_time, show_memory, show_time


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30m", 1800), ("1h30m", 5400), ("90s", 90), ("10 min", 600), ("1.5 hours", 5400), ("1d 2h", 93600)]
    + [(45, 45), (0.5, 0.5)],
)
def test_times(text: Any, seconds: float) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize(
    ("text", "count"), [("4GB", 4e9), ("512MiB", 2**29), ("4 gb", 4e9), ("1.5G", 1.5e9), (100, 100)]
)
def test_memories(text: Any, count: int) -> None:
    assert parse_memory(text) == count


@pytest.mark.parametrize(
    ("text", "right"),
    [("30", '"30m"'), ("30 minuets", '"30 m"'), ("30m1h", '"1h30m"'), ("30m 30m", '"1h"'), ("", '"30m"')]
    + [("soon", '"1h30m"'), ("0m", "more than nothing"), (-3, "more than nothing"), (None, '"30m"')],
)
def test_bad_times(text: Any, right: str) -> None:
    with pytest.raises(UserError, match=right):
        parse_time(text)


@pytest.mark.parametrize(
    ("text", "right"),
    [("4", '"4GB"'), ("4GBs", '"4GB"'), ("512Mib 1GB", "has two sizes"), ("much", '"4GB"'), (True, '"4GB"')],
)
def test_bad_memories(text: Any, right: str) -> None:
    with pytest.raises(UserError, match=right):
        parse_memory(text)


def test_shown_as_read() -> None:
    for seconds in (1, 59, 60, 5400, 86400, 93784):
        assert parse_time(show_time(seconds)) == seconds
    assert (show_memory(4 * 10**9), show_memory(2**29), show_memory(7)) == ("4GB", "536.9MB", "7B")


def test_clock() -> None:
    now = [100.0]
    clock = Clock(60.0, before=10.0, now=lambda: now[0])
    now[0] += 20
    assert (clock.spent, clock.left, clock.deadline) == (30.0, 30.0, pytest.approx(33.0))
    assert clock.may_start(31.0) and not clock.may_start(32.0)
    now[0] += 100
    assert clock.left == clock.deadline == 0.0 and not clock.may_start(0.0)
