"""A folder of images, one sub-folder per class, as rows; nothing outside the folder is read."""

from __future__ import annotations

from pathlib import Path

from tunewise.core.errors import UserError
from tunewise.data.image import SUFFIXES, NoImage, file_picture
from tunewise.data.objects import SPLIT_NAMES
from tunewise.data.table import Row, Table, bad_records, few, plural

__all__ = ["read_image_folder"]

Found = tuple[list[Row] | dict[str, list[Row]], list[str]]


def read_image_folder(folder: Path, skip_bad_rows: bool) -> Found | None:
    """(rows `image, label` or named sets, notes) of `CLASS/*.png` or `train/CLASS/*.png`; None if there are none.

    A folder of images without sub-folders gives rows without labels, to predict.
    """
    inside = _folders(folder)
    sets = [path for path in inside if path.name.lower() in SPLIT_NAMES]
    if sets and len(sets) == len(inside) and any(_folders(path) for path in sets):
        parts: dict[str, list[Row]] = {}
        notes: list[str] = []
        for path in sets:
            table = _read(path, folder)
            if not table.rows and not table.bad:
                raise UserError(f'"{path}" holds no images ({", ".join(SUFFIXES)}).')
            notes += table.notes + bad_records(f'"{path}"', table, skip_bad_rows)
            parts[path.name] = table.rows
        return parts, notes
    table = _read(folder, folder)
    if not table.rows and not table.bad:
        return None
    return table.rows, table.notes + bad_records(f'"{folder}"', table, skip_bad_rows)


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))


def _read(folder: Path, root: Path) -> Table:
    """Rows of one set, labelled by sub-folder."""
    table, other, classes = Table([]), list[str](), 0
    labelled = [path for path in _folders(folder) if any(_is_image(p) for p in _files(path))]
    alone = [] if labelled else [folder]
    for place in [*labelled, *alone]:
        before = len(table.rows)
        for path in _files(place):
            shown = str(path.relative_to(root))
            if not _is_image(path):
                other.append(shown)
                continue
            try:
                picture = file_picture(path, root, shown)
            except NoImage as problem:
                table.bad.append((shown, str(problem)))
                continue
            table.rows.append({"image": picture} | ({} if place in alone else {"label": place.name}))
        classes += len(table.rows) > before
    if labelled:
        other += [p.name for p in _files(folder)]
    how = f"in {plural(classes, 'folder')}, one for each class" if labelled else "without labels"
    if table.rows:
        table.notes.append(f"{folder.name}: {plural(len(table.rows), 'image')} {how}.")
    if other and table.rows:
        table.notes.append(f"{folder.name}: not read: {few(other)}.")
    return table


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES
