"""Axes on which costs of very different sizes stay apart, with ticks at round values."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["CostAxis", "cost_axis"]

MOST_TICKS = 6
WIDE = 4.0
MIB = 2.0**20
TIMES = (1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 18000, 36000, 86400, 259200, 604800)


def _counted(units: Sequence[tuple[float, str]]) -> Callable[[float], str]:
    """Ticks are round, so they are written out; `amount` and `size` would round two that are close to one."""

    def write(value: float) -> str:
        limit, unit = next(((n, u) for n, u in units if abs(value) >= n), (1.0, units[-1][1]))
        return f"{value / limit:g} {unit}".strip()

    return write


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:g} s"
    whole = round(seconds)
    parts = ((whole // 3600, "h"), (whole % 3600 // 60, "min"), (whole % 60, "s"))
    return " ".join(f"{value} {unit}" for value, unit in parts if value)


_bytes = _counted(((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")))
_parameters = _counted(((1e9, "B"), (1e6, "M"), (1e3, "k"), (1.0, "")))
# key -> how many of the unit that ticks are round in make up one of the row's, how a tick is written, and the
# least distance of two ticks: there is no half byte and no half parameter.
UNITS: dict[str, tuple[float, Callable[[float], str], float]] = {
    "peak_memory_mb": (MIB, _bytes, 1.0),
    "size_mb": (MIB, _bytes, 1.0),
    "seconds": (1.0, _time, 0.0),
    "trainable": (1.0, _parameters, 1.0),
    "inference_seconds": (1.0, lambda v: f"{v:g} s", 0.0),
    "forgetting": (1.0, lambda v: f"{v:g}", 0.0),
}


@dataclass(frozen=True)
class CostAxis:
    """Where values stand: `kind` is "linear", "log", or "symlog" (log with a place for zero)."""

    kind: str
    domain: tuple[float, float]
    ticks: list[float]
    labels: list[str]
    constant: float = 1.0

    def place(self, value: float) -> float:
        """From 0 at the left end to 1 at the right one."""
        if self.kind == "linear":
            low, high, at = *self.domain, value
        elif self.kind == "log":
            low, high, at = (math.log(v) for v in (*self.domain, value))
        else:
            low, high, at = (
                math.copysign(math.log1p(abs(v) / self.constant), v) for v in (*self.domain, value)
            )
        return (at - low) / (high - low)

    def scale(self) -> dict[str, Any]:
        """The arguments of the chart's scale."""
        more: dict[str, Any] = {"linear": {"zero": False}, "symlog": {"constant": self.constant}, "log": {}}
        return {"type": self.kind, "domain": list(self.domain), "nice": False, **more[self.kind]}

    def axis(self) -> dict[str, Any]:
        """The arguments of the chart's axis: these ticks with these labels."""
        chosen = f"{json.dumps(self.labels)}[indexof({json.dumps(self.ticks)}, datum.value)]"
        return {"values": self.ticks, "labelExpr": chosen}


def cost_axis(values: Sequence[float], key: str) -> CostAxis:
    """Logarithmic where values differ by more than a factor of four, with zero at its left end if there is one."""
    low, high = min(values), max(values)
    least = min((v for v in values if v > 0), default=0.0)
    unit, write, closest = UNITS[key]
    constant = 1.0
    if low < 0 or high <= WIDE * least or least == 0:
        kind, margin = "linear", 0.08 * (high - low) or 0.1 * abs(high) or 1.0
        domain = (low - margin, high + margin)
        first = domain[0] if low < 0 else max(0.0, domain[0])
        found = _even(first * unit, domain[1] * unit, closest, key == "seconds")
    else:
        kind, domain = "log", (low / 1.4, high * 1.4)
        if low == 0:
            kind, constant = "symlog", least / 2
            domain = (-constant / 2, high * 1.4)
        found = _growing(max(domain[0], least / 1.4) * unit, domain[1] * unit, key == "seconds")
        found = [0.0, *found] if low == 0 else found
    return CostAxis(kind, domain, [v / unit for v in found], [write(v) for v in found], constant)


def _even(low: float, high: float, closest: float, times: bool) -> list[float]:
    """Multiples of a round step, at most seven of them."""
    wanted = max(closest, (high - low) / MOST_TICKS)
    power = 10.0 ** math.floor(math.log10(wanted))
    steps = TIMES if times and TIMES[0] <= wanted <= TIMES[-1] else [m * power for m in (1, 2, 5, 10)]
    step = next(s for s in steps if s >= wanted * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    # Twelve digits, so that 3 x 0.1 is written 0.3.
    return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


def _growing(low: float, high: float, times: bool) -> list[float]:
    """1, 2, 5, 10, ... or powers of ten where that would be too many."""
    powers = [10.0**k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    fine = [m * p for p in powers for m in (1, 2, 5)]
    if times:
        fine = [v for v in fine if v < TIMES[0]] + list(TIMES)
    inside = [v for v in fine if low <= v <= high]
    if len(inside) > MOST_TICKS and not times:
        inside = [v for v in powers if low <= v <= high]
    every = math.ceil(len(inside) / MOST_TICKS)
    return inside[::every]
