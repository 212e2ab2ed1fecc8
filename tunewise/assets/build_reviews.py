"""Builds the shipped `reviews/*.jsonl.gz` from the source archive of vaderSentiment 0.5 (MIT licence).

    pip download --no-deps --no-binary :all: vaderSentiment==0.5
    python -m tunewise.assets.build_reviews vaderSentiment-0.5.zip

One JSON object per line: `id` (of the source), `rating` (mean of about 20 human raters, -4 to 4), `text`.
Every sentence of the source is kept. The output is byte-identical on every call with the same zlib.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path

from tunewise.core.errors import UserError

__all__ = ["ARCHIVE_SHA256", "build"]

ARCHIVE_SHA256 = "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a"
INNER = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
PARTS = {
    "movies": "movieReviewSnippets",
    "amazon": "amazonReviewSnippets",
    "tweets": "tweets",
    "nyt": "nytEditorialSnippets",
}


def build(archive: Path, out: Path) -> dict[str, str]:
    """Archive -> one gzipped JSONL per domain in `out`; returns the sha256 of each file written."""
    raw = archive.read_bytes()
    found = hashlib.sha256(raw).hexdigest()
    if found != ARCHIVE_SHA256:
        raise UserError(f'"{archive}" has sha256 {found}, expected {ARCHIVE_SHA256} (vaderSentiment 0.5).')
    hashes = {}
    with (
        zipfile.ZipFile(io.BytesIO(raw)) as outer,
        tarfile.open(fileobj=io.BytesIO(outer.read(INNER))) as tar,
    ):
        (out / "LICENSE.txt").write_bytes(outer.read("vaderSentiment-0.5/LICENSE.txt"))
        for domain, part in PARTS.items():
            member = tar.extractfile(f"hutto_ICWSM_2014/{part}_GroundTruth.txt")
            if member is None:
                raise UserError(f'"{archive}" lacks {part}_GroundTruth.txt.')
            packed = gzip.compress(_to_jsonl(member.read().decode("utf-8")), 9, mtime=0)
            (out / f"{domain}.jsonl.gz").write_bytes(packed)
            hashes[domain] = hashlib.sha256(packed).hexdigest()
    return hashes


def _to_jsonl(table: str) -> bytes:
    lines = []
    for line in table.splitlines():
        if line.strip():
            source_id, rating, text = line.split("\t", 2)
            row = {"id": source_id, "rating": float(rating), "text": text.strip()}
            lines.append(json.dumps(row, ensure_ascii=False))
    return ("\n".join(lines) + "\n").encode("utf-8")


if __name__ == "__main__":
    for name, digest in build(Path(sys.argv[1]), Path(__file__).parent / "reviews").items():
        print(f"{digest}  reviews/{name}.jsonl.gz")
