"""A table as it was read: rows, the bad records by line, and sentences that say what was detected."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunewise.core.errors import UserError

__all__ = ["Row", "Table", "bad_records", "few", "plural"]

Row = dict[str, Any]
NAMED = 5


@dataclass
class Table:
    """Rows of one file or object; `bad` pairs a place ("line 7") with what is wrong there."""

    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def few(items: Sequence[object] | Iterable[object], at_most: int = NAMED) -> str:
    """`1, 2, 3 and 4 more`."""
    items = list(items)
    shown = ", ".join(str(item) for item in items[:at_most])
    return shown if len(items) <= at_most else f"{shown} and {len(items) - at_most:,} more"


def bad_records(where: str, table: Table, skip_bad_rows: bool) -> list[str]:
    """Refuses bad records, or returns the sentence that counts the skipped ones."""
    if not table.bad:
        return []
    named = "; ".join(f"{place}: {reason}" for place, reason in table.bad[:NAMED])
    if len(table.bad) > NAMED:
        named += f"; and {len(table.bad) - NAMED:,} more"
    count = plural(len(table.bad), "bad row")
    if not skip_bad_rows:
        raise UserError(
            f"{where} has {count} ({named}). Mend them, or pass --skip-bad-rows to leave them out."
        )
    if not table.rows:
        raise UserError(f"{where} has no usable row, but {count} ({named}).")
    return [f"{where}: skipped {count} ({named})."]
