"""Whatever the user has -> rows with stable ids, and sentences that say what was read."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tunewise.assets import DATA, FixedSplits, demo_rows, fixed_splits
from tunewise.core.errors import UserError, nearest
from tunewise.data.files import READERS, read_file
from tunewise.data.folder import read_folder
from tunewise.data.hub import load_hub
from tunewise.data.image import put_pictures
from tunewise.data.objects import SPLIT_NAMES, from_object, own_splits
from tunewise.data.table import Row, bad_records, plural

__all__ = ["Rows", "read_rows"]

HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*(/[\w.-]+)?)(:(?P<config>[\w.-]+))?")


@dataclass
class Rows:
    """Rows of one source: each has a unique "id"; `splits` holds the same dicts if the source brings sets."""

    name: str
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    sha256: str = ""
    splits: dict[str, list[Row]] | None = None
    fixed: FixedSplits | None = None

    @property
    def columns(self) -> list[str]:
        """All column names, in the order of first occurrence, without "id"."""
        return [name for name in dict.fromkeys(n for row in self.rows for n in row) if name != "id"]

    def __len__(self) -> int:
        return len(self.rows)


class _Found(NamedTuple):
    name: str
    rows: list[Row] | dict[str, list[Row]]
    notes: list[str]
    fixed: FixedSplits | None = None


def read_rows(data: Any, *, skip_bad_rows: bool = False) -> Rows:
    """Rows of a path, demo name, `datasets` id or object; an existing path wins, `demo:` forces a demo name.

    A path is a CSV, TSV, JSONL, JSON or Parquet file, or a folder of such files (those called train, valid,
    test become sets), a folder of images with one sub-folder per class, or one of `datasets.save_to_disk`.
    Images (encoded bytes, names of files inside the data's folder, PIL images, arrays) become `Picture`s. An
    object is a list of dicts, a pandas DataFrame, a `datasets` object, or a dict of these or of paths, by set
    name. Row ids are a hash of the content, so that adding rows changes none; an `id` column of the source is
    kept as `source_id`.
    UserError names the file and lines of what cannot be read; `skip_bad_rows` leaves these out and counts
    them.
    """
    if isinstance(data, Rows):
        return data
    found = _find(data, skip_bad_rows)
    notes, splits = list(found.notes), None
    if isinstance(found.rows, dict):
        parts, sentences = own_splits(found.rows, found.name)
        notes += sentences
        sizes = [len(rows) for rows in parts.values()]
        rows, renamed = _with_ids([row for part in parts.values() for row in part])
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        splits = {n: rows[s : s + c] for n, s, c in zip(parts, starts, sizes, strict=True)}
    else:
        rows, renamed = _with_ids(found.rows)
    if not rows:
        raise UserError(f"{found.name} has no rows.")
    if renamed:
        notes.append(f'The column "id" is kept as "{renamed}"; row ids are hashes of the content.')
    return Rows(found.name, rows, notes, _content_hash(rows, splits), splits, found.fixed)


def _find(data: Any, skip_bad_rows: bool) -> _Found:
    if isinstance(data, (str, Path)):
        return _find_named(data, skip_bad_rows)
    if type(data) is dict and data:
        return _find_parts(data, skip_bad_rows)
    return _Found(*from_object(data))


def _find_parts(parts: Mapping[str, Any], skip_bad_rows: bool) -> _Found:
    strange = [name for name in parts if str(name).lower() not in SPLIT_NAMES]
    if strange:
        raise UserError(
            f'data is a dict with the key "{strange[0]}", expected sets named train, valid, test.'
        )
    sets: dict[str, list[Row]] = {}
    notes: list[str] = []
    names = []
    for name, part in parts.items():
        found = _find(part, skip_bad_rows)
        if isinstance(found.rows, dict):
            raise UserError(
                f'The {name} data "{found.name}" brings sets of its own: give one file for {name}.'
            )
        sets[str(name)] = found.rows
        notes += found.notes
        names.append(found.name)
    return _Found(" + ".join(names), sets, notes)


def _find_named(data: str | Path, skip_bad_rows: bool) -> _Found:
    name = str(data)
    if not name.strip():
        raise UserError("The name of the data is empty, expected a file, folder, demo name or dataset id.")
    if name.startswith("demo:"):
        return _demo(name.removeprefix("demo:"))
    path = Path(name).expanduser()
    if path.is_dir():
        rows, notes = read_folder(path, skip_bad_rows)
        return _Found(name, rows, notes)
    if path.exists():
        table = read_file(path)
        return _Found(name, table.rows, table.notes + bad_records(f'"{path}"', table, skip_bad_rows))
    if name in DATA:
        return _demo(name)
    hub = HUB_ID.fullmatch(name)
    if isinstance(data, Path) or hub is None or path.suffix.lower() in READERS:
        raise UserError(_missing(path, name))
    rows, notes = load_hub(hub["id"], hub["config"], name)
    return _Found(name, rows, notes)


def _demo(name: str) -> _Found:
    rows = demo_rows(name)
    put_pictures(rows, Path(), f"demo data {name}")
    asset = DATA[name]
    note = f"Demo data {name}: {asset.description}; {plural(len(rows), 'row')}. Licence: {asset.licence}."
    return _Found(name, rows, [note], fixed_splits(name))


def _missing(path: Path, name: str) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f'There is no folder "{folder}" (for "{name}").'
    near = nearest(path.name, [p.name for p in folder.iterdir()])
    if near:
        return f'There is no file or folder "{name}"; did you mean "{folder / near[0]}"?'
    return f'There is no file or folder "{name}".'


def _with_ids(given: list[Row]) -> tuple[list[Row], str]:
    """Copies with a content hash as "id" first; and the name under which an "id" column is kept."""
    kept = ""
    if any("id" in row for row in given):
        kept = "source_id"
        while any(kept in row for row in given):
            kept += "_"
    seen: Counter[str] = Counter()
    rows = []
    for row in given:
        content = {kept if k == "id" else k: _no_nan(v) for k, v in row.items()}
        digest = hashlib.sha1(_canonical(content).encode(), usedforsecurity=False).hexdigest()[:16]
        seen[digest] += 1
        number = seen[digest]
        rows.append({"id": digest if number == 1 else f"{digest}-{number}", **content})
    return rows, kept


def _no_nan(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _canonical(row: Row) -> str:
    # ASCII escapes, because a lone surrogate of a Python string has no bytes in UTF-8.
    try:
        return json.dumps(row, sort_keys=True, default=_describe)
    except TypeError:  # keys inside a value that are no strings, or do not sort
        return json.dumps(_text_keys(row), sort_keys=True, default=_describe)


def _text_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {f"{type(key).__name__}:{key!r}": _text_keys(item) for key, item in value.items()}
    return [_text_keys(item) for item in value] if isinstance(value, (list, tuple)) else value


def _describe(value: Any) -> str:
    if isinstance(value, (bytes, bytearray)):
        return hashlib.sha1(value, usedforsecurity=False).hexdigest()
    if isinstance(value, (set, frozenset)):
        return f"set:{sorted(map(repr, value))}"
    return f"{type(value).__name__}:{value!r}"


def _content_hash(rows: Iterable[Row], splits: Mapping[str, list[Row]] | None) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(_canonical(row).encode() + b"\n")
    for name, part in (splits or {}).items():
        digest.update(f"{name} {len(part)}\n".encode())
    return digest.hexdigest()
