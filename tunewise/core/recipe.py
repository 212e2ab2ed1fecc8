"""A recipe is a composition of parts, one whole way of fine-tuning; `a + b` composes two."""

from __future__ import annotations

import copy
from typing import Any

from .errors import UserError, did_you_mean
from .part import LIST_SLOTS, SLOTS, Part, build_part, describe_part, nested

__all__ = ["Recipe"]


def _parts(slot: str, given: Any) -> list[Part]:
    parts = list(given) if isinstance(given, (list, tuple)) else [given]
    for part in parts:
        if not isinstance(part, Part):
            raise UserError(f"The slot {slot} takes parts, not {type(part).__name__} ({part!r}).")
        if part.slot != slot:
            raise UserError(f"{type(part).__name__} fills the slot {part.slot!r}, not {slot!r}.")
    if slot not in LIST_SLOTS and len(parts) > 1:
        names = " and ".join(type(p).__name__ for p in parts)
        raise UserError(f"The slot {slot} holds one part, not {names}.")
    return parts


def _unique(parts: list[Part]) -> list[Part]:
    kept: list[Part] = []
    for part in parts:
        if not any(type(part) is type(k) and part == k for k in kept):
            kept.append(part)
    return kept


class Recipe:
    """slot -> parts, each slot *essential* (what the publication proposes) or *default* (what it needs to
    run).

    In `a + b` a default gives way to an essential; two essentials are both kept in list slots and refused by
    name in single ones. Raises `UserError` for an unknown slot, a part in the wrong slot, or two parts in a
    single slot.
    """

    def __init__(self, *, defaults: dict[str, Any] | None = None, name: str = "", **slots: Any) -> None:
        for slot in {**slots, **(defaults or {})}:
            if slot not in SLOTS:
                raise UserError(f'A recipe has no slot "{slot}"{did_you_mean(slot, SLOTS)}')
        self.name = name
        self.lr: tuple[float, ...] = ()
        self.essential = {s: _parts(s, v) for s, v in slots.items() if v is not None}
        self.default = {s: _parts(s, v) for s, v in (defaults or {}).items() if s not in self.essential}

    @classmethod
    def of(cls, part: Part, name: str = "") -> Recipe:
        """The recipe of one part."""
        slots: dict[str, Any] = {part.slot: part}
        return cls(name=name or type(part).__name__, **slots)

    def __add__(self, other: object) -> Recipe:
        if isinstance(other, Part):
            other = Recipe.of(other)
        if not isinstance(other, Recipe):
            return NotImplemented
        essential: dict[str, Any] = {}
        default: dict[str, Any] = {}
        for slot in SLOTS:
            mine, theirs = self.essential.get(slot, []), other.essential.get(slot, [])
            both = _unique(mine + theirs)
            if slot not in LIST_SLOTS and len(both) > 1:
                raise UserError(
                    f"{self.name or 'the first recipe'} and {other.name or 'the second'} cannot be combined: "
                    f"both decide the slot {slot} ({type(both[0]).__name__} and {type(both[1]).__name__}); "
                    f"use one of them with parts of other slots."
                )
            if both:
                essential[slot] = both
                continue
            fallback = _unique(self.default.get(slot, []) + other.default.get(slot, []))
            if fallback:
                default[slot] = fallback if slot in LIST_SLOTS else fallback[:1]
        result = Recipe(
            defaults=default, name=" + ".join(n for n in (self.name, other.name) if n), **essential
        )
        result.lr = self.lr if "delta" in self.essential or not other.lr else other.lr
        return result

    def __getitem__(self, slot: str) -> list[Part]:
        """The parts of a slot, essential or default."""
        if slot not in SLOTS:
            raise UserError(f'A recipe has no slot "{slot}"{did_you_mean(slot, SLOTS)}')
        return self.essential.get(slot) or self.default.get(slot, [])

    def single(self, slot: str) -> Part | None:
        """The one part of a slot that holds one, or None."""
        return next(iter(self[slot]), None)

    def parts(self) -> list[tuple[str, Part]]:
        """All parts in slot order, then recipe order: the order in which the core calls them."""
        return [(slot, part) for slot in SLOTS for part in self[slot]]

    def with_defaults(self, **slots: Any) -> Recipe:
        """The same recipe with empty slots filled."""
        result = copy.deepcopy(self)
        for slot, given in slots.items():
            if not result[slot] and given is not None:
                result.default[slot] = _parts(slot, given)
        return result

    def fresh(self) -> Recipe:
        """A copy whose parts have learnt nothing: every run gets one of its own."""
        result = copy.deepcopy(self)
        for _, part in result.parts():
            for one in nested(part):
                one.__dict__.pop("_state", None)
        return result

    def describe(self) -> dict[str, Any]:
        """JSON-ready, readable by `Recipe.from_description`."""
        return {
            "name": self.name,
            "essential": {s: [describe_part(p) for p in ps] for s, ps in self.essential.items()},
            "default": {s: [describe_part(p) for p in ps] for s, ps in self.default.items()},
        }

    @classmethod
    def from_description(cls, described: dict[str, Any]) -> Recipe:
        """The recipe that `describe` described."""
        filled = {s: [build_part(p) for p in ps] for s, ps in described["essential"].items()}
        default = {s: [build_part(p) for p in ps] for s, ps in described["default"].items()}
        return cls(defaults=default, name=described["name"], **filled)

    def __repr__(self) -> str:
        inner = ", ".join(f"{slot}={self[slot]}" for slot in SLOTS if self[slot])
        return f"Recipe({self.name!r}, {inner})"
