"""Train, valid and test sets by hash of the text: equal texts stay together, added rows move no other row."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunewise.core.errors import UserError, did_you_mean
from tunewise.data.columns import Columns
from tunewise.data.labels import is_missing
from tunewise.data.source import Rows
from tunewise.data.table import Row, plural

__all__ = ["Splits", "normalised_text", "split_rows"]

NAMES = ("train", "valid", "test")
CLASSES = ("classification", "image_classification")
"""Tasks whose answers are classes."""
CLASSES_SHOWN = 6
DEFAULT_SHARES = (0.1, 0.1)


@dataclass
class Splits:
    """The three sets (valid and test may be empty) and sentences about them; `splits["valid"]` works too."""

    train: list[Row]
    valid: list[Row]
    test: list[Row]
    notes: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> list[Row]:
        if name not in NAMES:
            raise KeyError(name)
        found: list[Row] = getattr(self, name)
        return found

    def items(self) -> Iterator[tuple[str, list[Row]]]:
        return ((name, self[name]) for name in NAMES)


@dataclass
class _Unit:
    """Rows that must stay together; `place` in [0, 1) is the hash of their key."""

    place: float
    rows: list[Row]


def split_rows(
    rows: Rows | Sequence[Row],
    columns: Columns,
    *,
    valid: float = 0.1,
    test: float | None = 0.1,
    fixed: tuple[int, int] | None = None,
    seed: int = 0,
    group_column: str | None = None,
) -> Splits:
    """u = hash(seed, text) in [0, 1): test if u < test, valid if u < test + valid, else train.

    The text is compared after case folding and collapsing white space, so duplicates never straddle; with
    `group_column`, rows of one group neither (then the group is hashed; rows linked through a shared text or
    a shared group form one unit). The threshold is the same for every class, so the split is stratified in
    expectation, and adding rows moves none (unless a new row links two groups). `fixed=(train, valid)`, or
    `rows.fixed` unless other shares are asked for, takes exact counts instead: proportional in every class,
    lowest hash first, the rest is test. Sets that the source brings are kept; a missing valid or test set is
    cut from its train rows. `test=None` makes no test set. UserError for impossible fractions or counts.
    """
    table = rows.rows if isinstance(rows, Rows) else list(rows)
    _check(table, columns, valid, test, group_column)
    if isinstance(rows, Rows) and rows.splits is not None:
        return _completed(rows.splits, columns, valid, test, seed, group_column)
    if fixed is None and isinstance(rows, Rows) and (valid, test) == DEFAULT_SHARES:
        fixed = rows.fixed
    if fixed is not None:
        return _by_count(table, columns, fixed, seed, group_column)
    return _by_hash(table, columns, valid, test or 0.0, seed, group_column)


def normalised_text(row: Row, columns: Columns) -> str:
    """The text columns of a row, NFKC, case folded, white space collapsed."""
    parts = []
    for name in columns.text:
        value = row.get(name)
        text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
        parts.append(" ".join(unicodedata.normalize("NFKC", text).casefold().split()))
    return "\x1f".join(parts)


def _check(table: list[Row], columns: Columns, valid: float, test: float | None, group: str | None) -> None:
    if not table:
        raise UserError("There are no rows to split.")
    for name, share in (("valid", valid), ("test", test or 0.0)):
        if not 0 <= share < 1:
            raise UserError(f"The {name} share is {share:g}, expected a number from 0 to below 1.")
    if valid + (test or 0.0) >= 1:
        raise UserError(f"The valid and test shares are {valid:g} + {test:g}: nothing is left to train on.")
    if group is not None and not all(group in row for row in table):
        names = list(dict.fromkeys(name for row in table for name in row))
        raise UserError(f'There is no column "{group}" in every row to group by{did_you_mean(group, names)}')
    ungrouped = 0 if group is None else sum(is_missing(row[group]) for row in table)
    if ungrouped:
        raise UserError(f'{plural(ungrouped, "row")} without a value in the group column "{group}".')


def _place(key: str, seed: int) -> float:
    digest = hashlib.sha1(f"{seed}\x00{key}".encode("utf-8", "surrogatepass"), usedforsecurity=False).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _units(table: Sequence[Row], columns: Columns, seed: int, group: str | None) -> list[_Unit]:
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    keys = []
    for row in table:
        text = normalised_text(row, columns)
        key = text if group is None else f"group\x1f{row[group]}"
        if group is not None:
            low, high = sorted((root(key), root(f"text\x1f{text}")))
            # The least key of the linked rows names the unit; every "group" sorts before every "text".
            parent[high] = low
        keys.append(key)
    members: dict[str, list[Row]] = defaultdict(list)
    for key, row in zip(keys, table, strict=True):
        members[root(key)].append(row)
    return [_Unit(_place(key, seed), found) for key, found in members.items()]


def _by_hash(
    table: Sequence[Row], columns: Columns, valid: float, test: float, seed: int, group: str | None
) -> Splits:
    chosen: dict[str, set[int]] = {name: set() for name in NAMES}
    for unit in _units(table, columns, seed, group):
        name = "test" if unit.place < test else "valid" if unit.place < test + valid else "train"
        chosen[name].update(id(row) for row in unit.rows)
    return _finish(table, columns, chosen, {"valid": valid, "test": test}, _hashed(columns))


def _by_count(
    table: Sequence[Row], columns: Columns, fixed: tuple[int, int], seed: int, group: str | None
) -> Splits:
    if min(fixed) < 0 or not 0 < fixed[0] <= len(table) - fixed[1]:
        raise UserError(f"Asked for {fixed[0]:,} train and {fixed[1]:,} valid rows of {len(table):,}.")
    classes: dict[str, list[_Unit]] = defaultdict(list)
    for unit in _units(table, columns, seed, group):
        classes[min(_class(row, columns) for row in unit.rows)].append(unit)
    sizes = {name: sum(len(unit.rows) for unit in units) for name, units in classes.items()}
    chosen: dict[str, set[int]] = {name: set() for name in NAMES}
    quotas = [_quotas(sizes, wanted) for wanted in fixed]
    for name in sorted(classes):
        left = [quota[name] for quota in quotas]
        for unit in sorted(classes[name], key=lambda u: u.place):
            # A unit larger than the room left goes on to the next set, so that counts stay exact.
            index = next((i for i, room in enumerate(left) if len(unit.rows) <= room), 2)
            if index < 2:
                left[index] -= len(unit.rows)
            chosen[NAMES[index]].update(id(row) for row in unit.rows)
    wanted = {"valid": fixed[1], "test": len(table) - sum(fixed)}
    return _finish(table, columns, chosen, wanted, f"fixed counts, {_hashed(columns)}")


def _class(row: Row, columns: Columns) -> str:
    return str(row.get(columns.label)) if columns.label and columns.task in CLASSES else ""


def _quotas(sizes: Mapping[str, int], wanted: int) -> dict[str, int]:
    """Largest remainders: proportional whole numbers whose sum is `wanted`."""
    total = sum(sizes.values())
    quotas = {name: size * wanted // total for name, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda name: (-(sizes[name] * wanted % total), name))
    for name in by_remainder[: wanted - sum(quotas.values())]:
        quotas[name] += 1
    return quotas


def _completed(
    given: Mapping[str, list[Row]],
    columns: Columns,
    valid: float,
    test: float | None,
    seed: int,
    group: str | None,
) -> Splits:
    share_valid = 0.0 if "valid" in given else valid
    share_test = 0.0 if "test" in given else test or 0.0
    cut = _by_hash(given["train"], columns, share_valid, share_test, seed, group)
    result = Splits(cut.train, given.get("valid", cut.valid), given.get("test", cut.test))
    made = [n for n, share in (("valid", share_valid), ("test", share_test)) if n not in given and share > 0]
    how = "as the source brings them" + (f"; {' and '.join(made)} cut from its train rows" if made else "")
    result.notes = _describe(result, columns, how)
    texts = {normalised_text(row, columns) for row in result.train}
    for name in ("valid", "test"):
        shared = sum(normalised_text(row, columns) in texts for row in result[name])
        if shared:
            result.notes.append(
                f"Warning: {plural(shared, name + ' row')} of the source also occur in train."
            )
    return result


def _finish(
    table: Sequence[Row],
    columns: Columns,
    chosen: Mapping[str, set[int]],
    wanted: Mapping[str, Any],
    how: str,
) -> Splits:
    train, valid, test = ([row for row in table if id(row) in chosen[name]] for name in NAMES)
    result = Splits(train, valid, test)
    if not result.train:
        raise UserError(f"Splitting {plural(len(table), 'row')} left none to train on: give more rows.")
    result.notes = _describe(result, columns, how)
    for name, share in wanted.items():
        if share and not result[name]:
            result.notes.append(f"Warning: {plural(len(table), 'row')} are too few, the {name} set is empty.")
    return result


def _hashed(columns: Columns) -> str:
    return f"by hash of the {'image' if columns.task == 'image_classification' else 'text'}"


def _describe(result: Splits, columns: Columns, how: str) -> list[str]:
    notes = [
        "Split " + how + ": " + ", ".join(f"{name} {len(rows):,}" for name, rows in result.items()) + "."
    ]
    if columns.task not in CLASSES or columns.label is None:
        return notes
    counts = {name: Counter(_class(row, columns) for row in rows) for name, rows in result.items()}
    classes = sorted(counts["train"])
    if len(classes) <= CLASSES_SHOWN:
        shares = (f"{c} " + "/".join(_share(counts[n], c) for n in NAMES if counts[n]) for c in classes)
        notes.append(f"Class shares ({'/'.join(n for n in NAMES if counts[n])}): {', '.join(shares)}.")
    for name in ("valid", "test"):
        unseen = sorted(set(counts[name]) - set(classes))
        if unseen:
            notes.append(f'Warning: the class "{unseen[0]}" occurs in {name} and not in train.')
    return notes


def _share(counts: Counter[str], name: str) -> str:
    return f"{100 * counts[name] / counts.total():.0f} %"
