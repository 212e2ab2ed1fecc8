"""A folder of data files, or one written by `datasets.save_to_disk`; nothing outside the folder is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tunewise.core.errors import UserError
from tunewise.data.files import READERS, read_file
from tunewise.data.image_folder import read_image_folder
from tunewise.data.objects import SPLIT_NAMES, from_datasets
from tunewise.data.table import Row, bad_records, few, plural

__all__ = ["read_folder"]

Found = tuple[list[Row] | dict[str, list[Row]], list[str]]


def read_folder(folder: Path, skip_bad_rows: bool) -> Found:
    """(rows or named sets, notes): files called train, valid, test become sets, others are joined; without data
    files, sub-folders of images are classes.
    """
    names = {path.name for path in folder.iterdir()}
    if names & {"dataset_dict.json", "state.json"}:
        return _saved_dataset(folder)
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix.lower() in READERS)
    other = sorted(names - {p.name for p in files})
    if not files and (found := read_image_folder(folder, skip_bad_rows)) is not None:
        return found
    if not files:
        raise UserError(
            f'"{folder}" holds no data file ({", ".join(READERS)})'
            + (f", only {few(other)}." if other else ": it is empty.")
        )
    notes = [f"{folder.name}: not read: {few(other)}."] if other else []
    sets: dict[str, list[Row]] = {}
    for path in files:
        _stay_inside(folder, path)
        table = read_file(path)
        notes += table.notes + bad_records(f'"{path}"', table, skip_bad_rows)
        if path.stem in sets:
            raise UserError(f'"{folder}" has more than one file called "{path.stem}": keep one.')
        sets[path.stem] = table.rows
    known = [stem for stem in sets if stem.lower() in SPLIT_NAMES]
    if not known:
        return _joined(folder, sets), notes
    if len(known) < len(sets):
        strange = next(stem for stem in sets if stem not in known)
        raise UserError(
            f'"{folder}" mixes sets ({few(known)}) with other data files (as "{strange}"): name the files '
            "train, valid and test, or pass them with --train, --valid and --test."
        )
    return sets, notes


def _joined(folder: Path, sets: dict[str, list[Row]]) -> list[Row]:
    columns = {stem: frozenset(rows[0]) for stem, rows in sets.items() if rows}
    first = next(iter(columns))
    for stem, names in columns.items():
        if names != columns[first]:
            different = few(sorted(names ^ columns[first]))
            raise UserError(f'"{folder}": files "{first}" and "{stem}" differ in the columns {different}.')
    return [row for rows in sets.values() for row in rows]


def _stay_inside(folder: Path, path: Path) -> None:
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f'"{path}" leads out of the folder "{folder}": put the file itself there.')


def _saved_dataset(folder: Path) -> Found:
    parts = [folder]
    listing = folder / "dataset_dict.json"
    if listing.is_file():
        parts = [folder / str(name) for name in _json(listing).get("splits", [])]
    for path in folder.rglob("*"):
        _stay_inside(folder, path)
    for part in parts:
        _stay_inside(folder, part)
        for item in _json(part / "state.json").get("_data_files") or []:
            _stay_inside(folder, part / str(item.get("filename")))
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as problem:
        raise UserError(f'"{folder}" is not a readable saved dataset: {problem}.') from problem
    _, rows, _ = from_datasets(loaded, f'"{folder}"', folder)
    count = len(rows) if isinstance(rows, list) else sum(map(len, rows.values()))
    return rows, [f"{folder.name}: saved Hugging Face dataset, {plural(count, 'row')}."]


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise UserError(f'"{path}" is not a readable part of a saved dataset: {problem}.') from problem
    if not isinstance(value, dict):
        raise UserError(f'"{path}" is not part of a saved dataset: expected a JSON object.')
    return value
