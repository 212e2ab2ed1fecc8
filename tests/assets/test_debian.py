"""Files out of a Debian package: verified, by hand or by apt, never installed."""

from __future__ import annotations

import gzip
import hashlib
import io
import shutil
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tunewise.assets import DATA, debian, demo_rows
from tunewise.assets.index import Asset
from tunewise.core.errors import UserError

NAME = "usr/share/datasets/fashion-mnist/train-{}-ubyte.gz"


def member(name: str, content: bytes) -> bytes:
    header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
    return header + content + b"\n" * (len(content) % 2)


def deb(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:xz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return b"!<arch>\n" + member("debian-binary", b"2.0\n!") + member("data.tar.xz", stream.getvalue())


def asset_of(package: bytes, contents: list[bytes]) -> Asset:
    return replace(
        DATA["fashion"],
        archive=hashlib.sha256(package).hexdigest(),
        sha256=hashlib.sha256(b"".join(contents)).hexdigest(),
    )


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNEWISE_CACHE", str(tmp_path))
    monkeypatch.setattr(debian.subprocess, "run", never)
    return tmp_path


def never(*args: Any, **options: Any) -> Any:
    raise AssertionError("apt was called")


def lay(cache: Path, package: bytes, asset: Asset) -> None:
    (cache / "packages").mkdir()
    (cache / "packages" / f"{asset.package}_{asset.version}_all.deb").write_bytes(package)


def test_a_package_laid_by_hand_is_read_and_verified(cache: Path) -> None:
    files = {NAME.format("labels-idx1"): b"two", NAME.format("images-idx3"): b"one", "etc/other": b"x"}
    package = deb(files)
    asset = asset_of(package, [b"one", b"two"])
    lay(cache, package, asset)
    assert debian.deb_files(asset, None) == [b"one", b"two"]
    with pytest.raises(UserError, match=f"expected {'0' * 64}"):
        debian.deb_files(replace(asset, sha256="0" * 64), None)
    with pytest.raises(UserError, match="is not the file Tunewise knows"):
        debian.deb_files(replace(asset, archive="0" * 64), None)


def test_without_apt_it_says_where_to_lay_the_package(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError) as refused:
        debian.deb_files(DATA["fashion"], None)
    assert "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb" in str(refused.value)
    assert str(cache / "packages") in str(refused.value)


def test_fashion_rows_are_made_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("PIL")
    import numpy as np

    from tunewise.assets import images
    from tunewise.assets.index import DATA as INDEX
    from tunewise.data.image import Picture

    labels = np.arange(30, dtype=np.uint8) % 10
    pictures = np.random.default_rng(0).integers(0, 256, (30, 28, 28), dtype=np.uint8)
    packed = [
        gzip.compress(b"\0\0\x08" + bytes([a.ndim]) + np.array(a.shape, ">u4").tobytes() + a.tobytes())
        for a in (pictures, labels)
    ]
    package = deb({NAME.format("images-idx3"): packed[0], NAME.format("labels-idx1"): packed[1]})
    asset = asset_of(package, packed)
    lay(cache, package, asset)
    monkeypatch.setattr(images, "EACH", 2)
    rows = images.fashion_rows(asset)
    assert Counter(row["label"] for row in rows) == dict.fromkeys(images.CLOTHES, 2)
    assert Picture(rows[0]["image"], "it").size == (56, 56)
    (cache / "packages").rename(cache / "gone")
    assert images.fashion_rows(asset) == rows
    assert INDEX["fashion"].splits == (2000, 500)


@pytest.mark.slow
def test_fashion() -> None:
    rows = demo_rows("fashion")
    assert set(Counter(row["label"] for row in rows).values()) == {350} and len(rows) == 3500
