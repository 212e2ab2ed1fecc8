"""Images of demo data sets, kept as one Parquet file: what Hugging Face datasets would read and write."""

from __future__ import annotations

import gzip
import io
from collections import Counter
from pathlib import Path
from typing import Any

from tunewise.assets.debian import deb_files
from tunewise.assets.fetch import Progress, cache_dir, made_once
from tunewise.assets.index import Asset

__all__ = ["fashion_rows"]

CLOTHES = (
    "t-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
EACH, EDGE = 350, 56


def fashion_rows(asset: Asset, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Rows `image` (PNG bytes, 56 x 56, grey) and `label`: the first 350 of each class, in the source's order."""
    import pyarrow
    import pyarrow.parquet

    def make(target: Path) -> None:
        from tunewise.data.image import pillow

        pillow()  # refused before the download
        images, labels = (_idx(packed) for packed in deb_files(asset, progress))
        table = pyarrow.Table.from_pylist(_rows(images, labels))
        pyarrow.parquet.write_table(table, target)

    path = made_once(cache_dir() / "data" / f"{asset.name}-{asset.sha256[:8]}-{EDGE}.parquet", make)
    found: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    return found


def _rows(images: Any, labels: Any) -> list[dict[str, Any]]:
    from PIL import Image

    rows, seen = [], Counter[int]()
    for pixels, label in zip(images, labels.tolist(), strict=True):
        seen[label] += 1
        if seen[label] > EACH:
            continue
        stream = io.BytesIO()
        Image.fromarray(pixels).resize((EDGE, EDGE), Image.Resampling.BICUBIC).save(stream, "PNG")
        rows.append({"image": stream.getvalue(), "label": CLOTHES[label]})
    return rows


def _idx(packed: bytes) -> Any:
    """An array of bytes in the IDX format: two zeros, type 8, number of axes, their sizes, values."""
    import numpy as np

    raw = gzip.decompress(packed)
    axes = raw[3]
    shape = np.frombuffer(raw, ">u4", axes, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)
