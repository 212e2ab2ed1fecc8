"""Fetches a package archive once with pip and reads verified files out of it; nothing in it is executed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from tunewise.assets.index import Asset
from tunewise.core.errors import UserError

__all__ = ["Progress", "archive_of", "cache_dir", "file_sha256", "made_once", "read_verified", "verify"]

Progress = Callable[[str], None]
CHUNK = 1 << 22


def cache_dir() -> Path:
    """The folder of fetched and converted assets: TUNEWISE_CACHE if set, else ~/.cache/tunewise."""
    chosen = os.environ.get("TUNEWISE_CACHE")
    return Path(chosen).expanduser().absolute() if chosen else Path.home() / ".cache" / "tunewise"


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def verify(what: str, expected: str, found: str) -> None:
    """UserError naming both hashes unless they are equal."""
    if found != expected:
        raise UserError(
            f"{what} is not the file Tunewise knows: sha256 expected {expected}, found {found}; "
            "delete it and try again, or report that the package has changed."
        )


def read_verified(asset: Asset, archive: zipfile.ZipFile) -> bytes:
    """The bytes of `asset.file` inside the archive, after its sha256 was checked."""
    raw = archive.read(asset.file)
    verify(f'"{asset.file}" in {asset.requirement}', asset.sha256, hashlib.sha256(raw).hexdigest())
    return raw


def made_once(target: Path, make: Callable[[Path], None]) -> Path:
    """`target` (file or folder), made by `make(scratch)` if it is missing; atomic, safe between processes."""
    if target.exists():
        return target
    from filelock import FileLock

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(
            f'The cache folder "{target.parent}" cannot be made ({problem.strerror}): set TUNEWISE_CACHE.'
        ) from problem
    with FileLock(f"{target}.lock"):
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
                made = Path(scratch) / target.name
                make(made)
                os.replace(made, target)
    return target


@contextmanager
def archive_of(asset: Asset, progress: Progress | None) -> Iterator[zipfile.ZipFile]:
    """The opened wheel of the asset: one laid into `<cache>/wheels` by hand, else fetched with pip."""
    with tempfile.TemporaryDirectory(prefix="tunewise-") as scratch:
        wheel = _local_wheel(asset)
        if wheel is None:
            if progress is not None:
                progress(f"Fetching {asset.requirement} ({asset.download_mb:g} MB) for {asset.name}.")
            wheel = _download(asset, Path(scratch))
        verify(f'"{wheel.name}"', asset.archive, file_sha256(wheel))
        with zipfile.ZipFile(wheel) as archive:
            yield archive


def _local_wheel(asset: Asset) -> Path | None:
    stem = f"{asset.package.replace('-', '_')}-{asset.version}-"
    found = sorted((cache_dir() / "wheels").glob(f"{stem}*.whl"))
    return found[0] if found else None


def _download(asset: Asset, folder: Path) -> Path:
    command = ["-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    by_hand = f"with a connection, run: python {' '.join(command)} --dest {cache_dir() / 'wheels'} {asset.requirement}"
    if find_spec("pip") is None:
        raise UserError(
            f'"{asset.name}" needs {asset.requirement}, and this Python has no pip to fetch it: {by_hand}'
        )
    done = subprocess.run(
        [sys.executable, *command, "--dest", str(folder), asset.requirement],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = reasons[-1].removeprefix("ERROR: ") if reasons else f"pip ended with {done.returncode}"
        raise UserError(f'Could not fetch {asset.requirement} for "{asset.name}" ({reason}); {by_hand}')
    return wheels[0]
