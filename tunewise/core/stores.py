"""Stores: named, bounded, checkpointed memories keyed by sample id (feature bank, replay, mistake log)."""

from __future__ import annotations

from collections import UserDict
from typing import Any

from .errors import UserError

__all__ = ["Store"]


class Store(UserDict[str, Any]):
    """sample id -> tensor, number, string, or list/dict of these; when full, the oldest entry goes.

    Raises `UserError` for a key that is no string or a capacity below 1.
    """

    def __init__(self, name: str, capacity: int) -> None:
        if capacity < 1:
            raise UserError(f"The store {name} needs a capacity of at least 1, not {capacity}.")
        super().__init__()
        self.name, self.capacity, self.evicted = name, capacity, 0

    def __setitem__(self, key: str, value: Any) -> None:
        if not isinstance(key, str):
            raise UserError(
                f"The store {self.name} is keyed by sample ids (strings), not {type(key).__name__}."
            )
        self.data.pop(key, None)
        self.data[key] = value
        while len(self.data) > self.capacity:
            self.data.pop(next(iter(self.data)))
            self.evicted += 1

    def state_dict(self) -> dict[str, Any]:
        return {"capacity": self.capacity, "evicted": self.evicted, "items": dict(self.data)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.capacity, self.evicted, self.data = state["capacity"], state["evicted"], dict(state["items"])
