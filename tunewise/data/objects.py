"""Python objects (lists, DataFrames, `datasets` objects) -> rows and splits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunewise.core.errors import UserError
from tunewise.data.image import GIVEN, picture_of, put_pictures
from tunewise.data.table import Row, plural

__all__ = ["SPLIT_NAMES", "from_datasets", "from_object", "own_splits"]

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "test": "test",
    "eval": "test",
    "evaluation": "test",
}

Splits = dict[str, list[Row]]


def own_splits(parts: Mapping[str, list[Row]], where: str) -> tuple[Splits, list[str]]:
    """Names like `validation` or `dev` -> train, valid, test; sets of another name are counted and left out."""
    splits: Splits = {}
    left_out = []
    for name, rows in parts.items():
        split = SPLIT_NAMES.get(name.lower())
        if split is None:
            left_out.append(f'"{name}" ({plural(len(rows), "row")})')
        elif split in splits:
            raise UserError(f'{where} has more than one {split} set: "{name}" is the second.')
        else:
            splits[split] = rows
    if "train" not in splits:
        raise UserError(f"{where} has no train set, only {', '.join(parts)}.")
    notes = [f"{where} brings its own sets: " + ", ".join(f"{n} {len(r):,}" for n, r in splits.items()) + "."]
    if left_out:
        notes.append(f"{where}: not used: {', '.join(left_out)}.")
    return splits, notes


def from_object(data: Any) -> tuple[str, list[Row] | dict[str, list[Row]], list[str]]:
    """(name, rows or named sets of rows, notes) of a list of dicts, a DataFrame or a `datasets` object."""
    kind = type(data)
    if kind.__module__.partition(".")[0] == "datasets":
        return from_datasets(data, "the dataset")
    if kind.__module__.partition(".")[0] == "pandas" and kind.__name__ == "DataFrame":
        rows = _with_pictures(_frame_rows(data), "DataFrame")
        return (
            "DataFrame",
            rows,
            [f"DataFrame: {plural(len(rows), 'row')}, columns {', '.join(map(str, data))}."],
        )
    if isinstance(data, (list, tuple)):
        rows = _with_pictures(_list_rows(data), kind.__name__)
        return kind.__name__, rows, [f"{kind.__name__} of {plural(len(rows), 'row')}."]
    raise UserError(
        f"data is of type {kind.__name__}, expected a path, a demo name, a list of dicts, a pandas DataFrame, "
        "a datasets.Dataset or a dict of such lists named train, valid, test."
    )


def _list_rows(data: Any) -> list[Row]:
    rows = []
    for number, item in enumerate(data):
        if not isinstance(item, Mapping):
            raise UserError(
                f"data[{number}] is of type {type(item).__name__}, expected a dict of column -> value."
            )
        rows.append({str(name): _plain(value) for name, value in item.items()})
    return rows


def _frame_rows(frame: Any) -> list[Row]:
    names = [str(name) for name in frame.columns]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f'The DataFrame has more than one column "{twice[0]}".')
    columns = [[_plain(value) for value in frame.iloc[:, i].tolist()] for i in range(len(names))]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _plain(value: Any) -> Any:
    """numpy scalars and arrays -> Python; NaN, NaT and NA -> None (missing)."""
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    picture = picture_of(value, GIVEN)
    if picture is not None:
        return picture
    if type(value).__module__ == "numpy":
        value = value.tolist()
    return None if isinstance(value, float) and math.isnan(value) else value


def from_datasets(
    data: Any, where: str, folder: Path | None = None
) -> tuple[str, list[Row] | dict[str, list[Row]], list[str]]:
    """(name, rows or sets, notes) of a datasets.Dataset or DatasetDict; class numbers become class names.

    Files that its images name must lie in `folder`; None: anywhere, as for an object that the user has made.
    """
    name = type(data).__name__
    if isinstance(data, Mapping):
        return name, {str(part): _dataset_rows(rows, where, folder) for part, rows in data.items()}, []
    if not hasattr(data, "features") or not hasattr(data, "column_names"):
        raise UserError(f"{where} is a {name}, expected a datasets.Dataset or DatasetDict.")
    rows = _dataset_rows(data, where, folder)
    return (
        name,
        rows,
        [f"{where}: {name}, {plural(len(rows), 'row')}, columns {', '.join(data.column_names)}."],
    )


def _dataset_rows(data: Any, where: str, folder: Path | None) -> list[Row]:
    features = data.features or {}
    images = [n for n, f in features.items() if type(f).__name__ == "Image"]
    for name in images:  # as they are kept: decoding here would follow a path wherever it leads
        data = data.cast_column(name, type(features[name])(decode=False))
    classes = {n: f.names for n, f in features.items() if type(f).__name__ == "ClassLabel"}
    rows = [{name: _plain(value) for name, value in row.items()} for row in data]
    for row in rows:
        for column, names in classes.items():
            number = row[column]
            # The hub's convention for "no label" is -1.
            row[column] = names[number] if number is not None and number >= 0 else None
        for column in images if folder is None else ():
            value = row[column]
            if value is not None and value.get("bytes") is None and value.get("path"):
                row[column] = Path(value["path"])
    return _with_pictures(rows, where, folder)


def _with_pictures(rows: list[Row], where: str, folder: Path | None = None) -> list[Row]:
    """Images as pictures; names of files are looked up in `folder`, by default the current one."""
    bad = put_pictures(rows, folder or Path(), where)
    if bad:
        number, reason = bad[0]
        more = f", and {plural(len(bad) - 1, 'more row')} cannot be used" if len(bad) > 1 else ""
        raise UserError(f"{where}, row {number}: {reason}{more}.")
    return rows
