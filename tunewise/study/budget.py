"""Budgets as people write them ("1h30m", "4GB"), and the clock that keeps one."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from typing import Any

from tunewise.core.errors import UserError, nearest

__all__ = ["TOLERANCE", "Clock", "parse_memory", "parse_time", "show_memory", "show_time"]

TOLERANCE = 1.05
"""A budget may be passed by this factor, and never by more: a step that has begun is finished."""

TIMES = {
    "d": (86400.0, ("day", "days")),
    "h": (3600.0, ("hr", "hrs", "hour", "hours")),
    "m": (60.0, ("min", "mins", "minute", "minutes")),
    "s": (1.0, ("sec", "secs", "second", "seconds")),
}
BYTES = {
    "B": (1.0, ("byte", "bytes")),
    "kB": (1e3, ("K",)),
    "MB": (1e6, ("M",)),
    "GB": (1e9, ("G",)),
    "TB": (1e12, ("T",)),
    "KiB": (2.0**10, ()),
    "MiB": (2.0**20, ()),
    "GiB": (2.0**30, ()),
    "TiB": (2.0**40, ()),
}
_PAIR = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*([A-Za-zµ]+)\s*")


def parse_time(given: Any) -> float:
    """Seconds in "30m", "1h30m", "90s", "10 min" or a number of seconds; `UserError` with the nearest form."""
    if isinstance(given, str):
        pairs = _pairs(given, TIMES, "time", "30m", "1h30m")
        units = [list(TIMES).index(unit) for _, unit in pairs]
        if units != sorted(set(units)):
            total = sum(number * TIMES[unit][0] for number, unit in pairs)
            raise UserError(f'The time "{given}" names its units out of order; write "{show_time(total)}".')
        given = sum(number * TIMES[unit][0] for number, unit in pairs)
    return _positive(given, "time", "30m")


def parse_memory(given: Any) -> int:
    """Bytes in "4GB" (10^9), "512MiB" (2^20) or a number of bytes; `UserError` with the nearest form."""
    if isinstance(given, str):
        pairs = _pairs(given, BYTES, "memory", "4GB", "512MiB")
        if len(pairs) > 1:
            total = sum(number * BYTES[unit][0] for number, unit in pairs)
            raise UserError(f'The memory "{given}" has two sizes; write one, "{show_memory(round(total))}".')
        given = pairs[0][0] * BYTES[pairs[0][1]][0]
    return max(1, round(_positive(given, "memory", "4GB")))


def show_time(seconds: float) -> str:
    """The shortest form that `parse_time` reads, to the second: 5400 -> "1h30m"."""
    left, shown = max(1, round(seconds)), ""
    for unit, (size, _) in TIMES.items():
        count, left = divmod(left, int(size))
        shown += f"{count}{unit}" if count else ""
    return shown


def show_memory(count: int) -> str:
    """A form that `parse_memory` reads: 4 * 10^9 -> "4GB"."""
    unit = next((u for u in ("TB", "GB", "MB", "kB") if count >= BYTES[u][0]), "B")
    return f"{count / BYTES[unit][0]:.4g}{unit}"


def _pairs(text: str, units: dict[str, Any], what: str, short: str, long: str) -> list[tuple[float, str]]:
    found, place = [], 0
    while match := _PAIR.match(text, place):
        found.append((float(match[1]), _unit(match[2], units, what, text, match)))
        place = match.end()
    if found and place == len(text):
        return found
    number = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*", text)
    default = short.lstrip("0123456789")
    instead = f'write "{number[1]}{default}"' if number else f'write for example "{short}" or "{long}"'
    raise UserError(f'The {what} "{text}" cannot be read; {instead}.')


def _unit(word: str, units: dict[str, Any], what: str, text: str, match: re.Match[str]) -> str:
    words = {form: unit for unit, (_, others) in units.items() for form in (unit, *others)}
    lower = {form.lower(): unit for form, unit in words.items()}
    if word.lower() in lower:
        return lower[word.lower()]
    near = nearest(word, words)
    right = words[near[0]] if near else None
    whole = f"{text[: match.start(2)]}{right}{text[match.end(2) :]}"
    hint = f'did you mean "{whole.strip()}"?' if right else f"known: {', '.join(units)}."
    raise UserError(f'The {what} "{text}" has an unknown unit "{word}"; {hint}')


def _positive(given: Any, what: str, example: str) -> float:
    if isinstance(given, bool) or not isinstance(given, (int, float)):
        raise UserError(f'A {what} is a number or a text such as "{example}", not {given!r}.')
    if not math.isfinite(given) or given <= 0:
        raise UserError(f'The {what} {given!r} must be more than nothing; write for example "{example}".')
    return float(given)


class Clock:
    """spent = before + now - start; what may still be begun is what is expected to end within the budget.

    budget  seconds
    before  seconds that earlier sessions of the same study took
    now     the source of time, in seconds from any origin
    """

    def __init__(
        self, budget: float, *, before: float = 0.0, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.budget, self.before, self.now = budget, before, now
        self.start = now()

    @property
    def spent(self) -> float:
        """Seconds since the start of the study, without the pauses between its sessions."""
        return self.before + self.now() - self.start

    @property
    def left(self) -> float:
        """Seconds until the budget is used; never below zero."""
        return max(0.0, self.budget - self.spent)

    @property
    def deadline(self) -> float:
        """Seconds until whatever still runs must be stopped."""
        return max(0.0, self.budget * TOLERANCE - self.spent)

    def may_start(self, expected_seconds: float) -> bool:
        """Whether work that is expected to take so long may begin; half of the tolerance is left to errors."""
        return self.spent + expected_seconds <= self.budget * (1 + (TOLERANCE - 1) / 2)
