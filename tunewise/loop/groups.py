"""In which batches frozen states are computed: always the same ones, whoever asks first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tunewise.core.run import Run
from tunewise.core.streams import Example, Stream

from .frozen import row_keys

__all__ = ["Groups"]

POSITIONS = 4096
"""Padding included, of a group that is computed at once."""
ROWS = 32


class Groups:
    """The batches of the first epoch under `seed`, cut where they are long.

    Sums are rounded differently in batches of other shapes. A killed trial that goes on, or one that starts after
    other trials, finds the states that the undisturbed one has computed only if no trial chooses the batch.
    """

    def __init__(self, run: Run, seed: int, padded: bool) -> None:
        self.run, self.padded = run, padded
        self._where: dict[bytes, int] = {}
        self._groups: list[list[Example]] = []
        self._rest = self._batches(seed)

    def _batches(self, seed: int) -> Iterator[list[Example]]:
        settings = self.run.settings
        size, by_length = getattr(settings, "batch_size", ROWS), getattr(settings, "by_length", True)
        for name, rows in self.run.streams.data.items():
            stream = Stream(name, rows, size, seed, by_length) if rows else None
            for batch in stream.order(0) if stream else ():
                yield from _cut([rows[i] for i in batch])

    def of(self, keys: list[bytes]) -> Iterator[Any]:
        """The groups that hold these rows, collated; rows of no stream are in none."""
        found: dict[int, None] = {}
        for key in keys:
            while key not in self._where and (rows := next(self._rest, None)) is not None:
                named = row_keys(self.run.collate(rows).inputs, self.padded)
                for name in named or ():
                    self._where.setdefault(name, len(self._groups))
                self._groups.append(rows)
            if key in self._where:
                found[self._where[key]] = None
        for number in found:
            yield self.run.collate(self._groups[number])


def _cut(batch: list[Example]) -> Iterator[list[Example]]:
    rows: list[Example] = []
    longest = 0
    for row in batch:
        longest = max(longest, int(row.get("length", 1)))
        if rows and (len(rows) + 1) * longest > POSITIONS:
            yield rows
            rows, longest = [], int(row.get("length", 1))
        rows.append(row)
    yield rows
