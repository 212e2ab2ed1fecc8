"""Stores: named, bounded, checkpointed memories keyed by sample id (feature bank, replay, mistake log)."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

from .errors import UserError

__all__ = ["Store"]


class Store(MutableMapping[str, Any]):
    """sample id -> tensor, number, string, or list/dict of these; when full, the oldest entry goes.

    Raises `UserError` for a key that is no string or a capacity below 1.
    """

    def __init__(self, name: str, capacity: int) -> None:
        if capacity < 1:
            raise UserError(f"The store {name} needs a capacity of at least 1, not {capacity}.")
        self.name, self.capacity, self.evicted = name, capacity, 0
        self._items: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if not isinstance(key, str):
            raise UserError(
                f"The store {self.name} is keyed by sample ids (strings), not {type(key).__name__}."
            )
        self._items.pop(key, None)
        self._items[key] = value
        while len(self._items) > self.capacity:
            self._items.pop(next(iter(self._items)))
            self.evicted += 1

    def __delitem__(self, key: str) -> None:
        del self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def state_dict(self) -> dict[str, Any]:
        return {"capacity": self.capacity, "evicted": self.evicted, "items": dict(self._items)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.capacity, self.evicted, self._items = state["capacity"], state["evicted"], dict(state["items"])
