"""CSV, TSV, JSONL, JSON and Parquet files -> rows; a record that cannot be read is reported by its line."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tunewise.core.errors import UserError
from tunewise.data.image import put_pictures
from tunewise.data.table import Row, Table, few, plural

__all__ = ["READERS", "read_file"]

DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}
INTEGER = re.compile(r"-?(0|[1-9]\d{0,17})")
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
# Bytes that are not UTF-8 are kept as lone surrogates, so that the record which holds them can be named.
UNDECODED = re.compile("[\udc80-\udcff]")
NOT_UTF8 = "bytes that are not UTF-8 (if the file is in Latin-1 or another encoding, convert it to UTF-8)"
FIELD_LIMIT = 1 << 26


def read_file(path: Path) -> Table:
    """The table in `path`, read by its extension; UserError when it is empty, unreadable or unknown."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f'"{path}" has the extension "{path.suffix}", expected one of {", ".join(READERS)}.')
    try:
        if path.stat().st_size == 0:
            raise UserError(f'"{path}" is empty.')
        table = reader(path)
        _put_pictures(table, path)
    except OSError as error:
        raise UserError(f'"{path}" cannot be read: {error.strerror or error}.') from error
    if not table.rows and not table.bad:
        raise UserError(f'"{path}" has no rows.')
    return table


def _put_pictures(table: Table, path: Path) -> None:
    """Cells that name or hold images become pictures; those that cannot are bad records."""
    bad = dict(put_pictures(table.rows, path.parent, path.name))
    table.bad += [(f"row {number}", reason) for number, reason in bad.items()]
    table.rows = [row for number, row in enumerate(table.rows, start=1) if number not in bad]


def _text(path: Path) -> tuple[str, str]:
    raw = path.read_bytes()
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            return raw.decode("utf-16"), "UTF-16"
        except UnicodeDecodeError as problem:
            raise UserError(f'"{path}" begins as UTF-16 and breaks at byte {problem.start}.') from problem
    return raw.decode("utf-8-sig", "surrogateescape"), "UTF-8"


def _read_delimited(path: Path) -> Table:
    text, encoding = _text(path)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else _delimiter(text)
    records = list(_records(text, delimiter, csv.QUOTE_MINIMAL))
    quoting = ""
    if delimiter == "\t" and any(error or len(r) != len(records[0][1]) for _, r, error in records):
        # Tab-separated files are often written without quoting, where a lone quote mark is just text.
        plain = list(_records(text, delimiter, csv.QUOTE_NONE))
        if sum(len(r) != len(plain[0][1]) for _, r, _ in plain) < sum(
            bool(error) or len(r) != len(records[0][1]) for _, r, error in records
        ):
            records, quoting = plain, ", quote marks read as text"
    table = _with_header(path, records)
    numeric = _numbers(table.rows)
    columns = list(table.rows[0]) if table.rows else []
    table.notes.insert(
        0,
        f"{path.name}: {DELIMITERS[delimiter]}-separated, {encoding}{quoting}, {plural(len(table.rows), 'row')}, "
        f"columns {', '.join(columns)}" + (f" (numbers: {', '.join(numeric)})." if numeric else "."),
    )
    return table


def _records(text: str, delimiter: str, quoting: Any) -> Iterator[tuple[str, list[str], str]]:
    """(place, fields, error) of every record that is not blank; the line numbers start at 1."""
    limit = csv.field_size_limit(FIELD_LIMIT)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, quoting=quoting)
        while True:
            first = reader.line_num + 1
            fields, error = [], ""
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as problem:
                error = f"broken quoting ({problem})"
            last = reader.line_num
            if fields or error:
                yield f"line {first}" if last <= first else f"lines {first}-{last}", fields, error
    finally:
        csv.field_size_limit(limit)


def _delimiter(text: str) -> str:
    best, chosen = (0.0, 0), ","
    for delimiter in DELIMITERS:
        widths: list[int] = []
        for _, fields, _ in _records(text[:200_000], delimiter, csv.QUOTE_MINIMAL):
            widths.append(len(fields))
            if len(widths) == 50:
                break
        if widths and widths[0] > 1:
            score = (sum(w == widths[0] for w in widths) / len(widths), widths[0])
            if score > best:
                best, chosen = score, delimiter
    return chosen


def _with_header(path: Path, records: list[tuple[str, list[str], str]]) -> Table:
    if not records:
        raise UserError(f'"{path}" has no rows.')
    place, header, error = records[0]
    header = [name.strip() for name in header]
    unnamed = [i for i, name in enumerate(header) if not name]
    header = [name or f"column_{i + 1}" for i, name in enumerate(header)]
    if error or len(unnamed) == len(header) or UNDECODED.search("".join(header)):
        raise UserError(f'"{path}", {place}: expected the column names, found {error or header!r}.')
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise UserError(f'"{path}", {place}: column name "{twice[0]}" occurs more than once.')
    if any(NUMBER.fullmatch(name) for name in header):
        raise UserError(f'"{path}", {place}: expected column names, found {few(header)}; add a header line.')
    table = Table([])
    if unnamed:
        table.notes.append(f"{path.name}: columns without a name: {few(header[i] for i in unnamed)}.")
    for place, fields, error in records[1:]:
        if not error and len(fields) != len(header):
            error = f"{plural(len(fields), 'field')}, expected {len(header)}"
        if not error and any(UNDECODED.search(value) for value in fields):
            error = NOT_UTF8
        if error:
            table.bad.append((place, error))
        else:
            table.rows.append(dict(zip(header, fields, strict=True)))
    return table


def _numbers(rows: list[Row]) -> list[str]:
    """Turns columns in which every cell is a number or empty into numbers; returns their names."""
    found = []
    for name in rows[0] if rows else ():
        values = [row[name].strip() for row in rows]
        given = [value for value in values if value]
        # "007" is not an integer: it is a code, and stays text.
        kind: Callable[[str], Any] | None = None
        if given and all(INTEGER.fullmatch(value) for value in given):
            kind = int
        elif given and all(NUMBER.fullmatch(v) and (INTEGER.fullmatch(v) or not v.isdigit()) for v in given):
            kind = float
        if kind is not None:
            found.append(name)
            for row, value in zip(rows, values, strict=True):
                row[name] = kind(value) if value else None
    return found


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _object(text: str) -> tuple[Any, str]:
    if UNDECODED.search(text):
        return None, NOT_UTF8
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
        # An escaped half of a surrogate pair is valid JSON and no text that a tokenizer could read.
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value, ""
    except UnicodeEncodeError:
        return None, "half of a surrogate pair"
    except json.JSONDecodeError as problem:
        return None, f"not valid JSON ({problem.msg} at character {problem.pos + 1})"
    except (ValueError, RecursionError) as problem:
        return None, f"not valid JSON ({problem})"


def _read_jsonl(path: Path) -> Table:
    text, encoding = _text(path)
    table = Table([])
    # Not splitlines(): a JSON string may hold U+2028 and its like unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            value, error = _object(line)
            if not error and not isinstance(value, dict):
                error = f"expected a JSON object, found {type(value).__name__}"
            if error:
                table.bad.append((f"line {number}", error))
            else:
                table.rows.append(value)
    table.notes = [
        f"{path.name}: JSON lines, {encoding}, {plural(len(table.rows), 'row')}, {_columns(table.rows)}."
    ]
    return table


def _read_json(path: Path) -> Table:
    text, encoding = _text(path)
    value, error = _object(text)
    if error:
        lines = text.lstrip().split("\n", 2)
        hint = (
            '; it looks like JSON lines: call it ".jsonl"'
            if len(lines) > 1 and not _object(lines[0])[1]
            else ""
        )
        raise UserError(f'"{path}" is {error}{hint}.')
    if not isinstance(value, list):
        raise UserError(f'"{path}": expected a JSON list of objects, found {type(value).__name__}.')
    table = Table([])
    for number, item in enumerate(value, start=1):
        if isinstance(item, dict):
            table.rows.append(item)
        else:
            table.bad.append((f"item {number}", f"expected an object, found {type(item).__name__}"))
    table.notes = [
        f"{path.name}: JSON list, {encoding}, {plural(len(table.rows), 'row')}, {_columns(table.rows)}."
    ]
    return table


def _read_parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        rows = file.read().to_pylist()
        _name_classes(rows, file.schema_arrow.metadata or {})
    except pyarrow.ArrowException as problem:
        reason = str(problem).splitlines()[0]
        raise UserError(f'"{path}" is not a readable Parquet file: {reason}.') from problem
    return Table(rows, [f"{path.name}: Parquet, {plural(len(rows), 'row')}, {_columns(rows)}."])


def _name_classes(rows: list[Row], metadata: dict[bytes, bytes]) -> None:
    """Class numbers become the class names that Hugging Face datasets keeps beside them; -1 is no label."""
    said, _ = _object(metadata.get(b"huggingface", b"{}").decode("utf-8", "replace"))
    features = (said or {}).get("info", {}).get("features", {}) if isinstance(said, dict) else {}
    for column, feature in features.items():
        names = feature.get("names") if isinstance(feature, dict) else None
        if not isinstance(names, list) or feature.get("_type") != "ClassLabel":
            continue
        for row in rows:
            number = row.get(column)
            if isinstance(number, int) and number < len(names):
                row[column] = names[number] if number >= 0 else None


def _columns(rows: list[Row]) -> str:
    names = list(dict.fromkeys(sys.intern(name) for row in rows for name in row))
    return "columns " + ", ".join(names)


READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": _read_delimited,
    ".tsv": _read_delimited,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
