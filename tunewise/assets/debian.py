"""Fetches a Debian package once with apt and reads verified files out of it; nothing in it is installed or run."""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import tarfile
import tempfile
from fnmatch import fnmatch
from pathlib import Path

from tunewise.assets.fetch import Progress, cache_dir, file_sha256, verify
from tunewise.assets.index import Asset
from tunewise.core.errors import UserError

__all__ = ["deb_files"]

HEADER = 60
"""Bytes before each member of an `ar` archive: name in the first 16, size in 10 from byte 48."""


def deb_files(asset: Asset, progress: Progress | None) -> list[bytes]:
    """The files that match `asset.file`, by name, after the sha256 of the package and theirs were checked.

    A package laid into `<cache>/packages` by hand is taken, else one that apt keeps or fetches. UserError says
    where to lay it on systems without apt.
    """
    with tempfile.TemporaryDirectory(prefix="tunewise-") as scratch:
        package = _local(asset) or _download(asset, Path(scratch), progress)
        verify(f'"{package.name}"', asset.archive, file_sha256(package))
        found = _members(package.read_bytes(), asset.file)
    verify(
        f'"{asset.file}" in {_named(asset)}',
        asset.sha256,
        hashlib.sha256(b"".join(found.values())).hexdigest(),
    )
    return list(found.values())


def _named(asset: Asset) -> str:
    return f"{asset.package}={asset.version}"


def _local(asset: Asset) -> Path | None:
    found = sorted((cache_dir() / "packages").glob(f"{asset.package}_{asset.version}_*.deb"))
    return found[0] if found else None


def _download(asset: Asset, folder: Path, progress: Progress | None) -> Path:
    by_hand = (
        f"get {asset.package}_{asset.version}_all.deb from a Debian mirror (pool/main/{asset.package[0]}/"
        f"{asset.package}) and lay it into {cache_dir() / 'packages'}"
    )
    if shutil.which("apt-get") is None:
        raise UserError(f'"{asset.name}" is a Debian package, and this system has no apt: {by_hand}')
    if progress is not None:
        progress(f"Fetching {_named(asset)} ({asset.download_mb:g} MB) for {asset.name}.")
    done = subprocess.run(
        ["apt-get", "download", "--quiet", _named(asset)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    packages = sorted(folder.glob("*.deb"))
    if done.returncode != 0 or not packages:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("E:")]
        reason = (
            reasons[-1].removeprefix("E: ").rstrip(".")
            if reasons
            else f"apt-get ended with {done.returncode}"
        )
        raise UserError(f'Could not fetch {_named(asset)} for "{asset.name}" ({reason}); {by_hand}')
    return packages[0]


def _members(package: bytes, pattern: str) -> dict[str, bytes]:
    """{name: content} of the files in the package's data archive that match, in the order of their names."""
    with tarfile.open(fileobj=io.BytesIO(_data(package))) as archive:
        named = {m.name.removeprefix("./"): m for m in archive.getmembers() if m.isfile()}
        chosen = sorted(name for name in named if fnmatch(name, pattern))
        opened = {name: archive.extractfile(named[name]) for name in chosen}
        return {name: stream.read() for name, stream in opened.items() if stream is not None}


def _data(package: bytes) -> bytes:
    at = len(b"!<arch>\n")
    while at + HEADER <= len(package):
        name = package[at : at + 16].decode("ascii", "replace").strip().rstrip("/")
        size = int(package[at + 48 : at + 58])
        if name.startswith("data.tar"):
            return package[at + HEADER : at + HEADER + size]
        at += HEADER + size + size % 2
    raise UserError("The Debian package holds no data archive.")
