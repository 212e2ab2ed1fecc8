"""Images as values of rows: encoded bytes, or a file inside the data's folder, named by a hash of their content."""

from __future__ import annotations

import base64
import hashlib
import io
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tunewise.core.errors import UserError
from tunewise.data.table import Row

__all__ = ["GIVEN", "SUFFIXES", "Picture", "is_picture_column", "picture_of", "pillow", "put_pictures"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
# Only decoders of pixels: Pillow would start other programs for some formats.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
MAGIC = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"P5", b"P6", b"P2", b"P3")
GIVEN = "among the given rows"
"""What a picture is called until its row is known."""
TRIED = 50
DEEP = ("I", "I;16", "I;16B", "I;16L")
SAVED = ("1", "L", "LA", "P", "RGB", "RGBA", *DEEP)


class NoImage(ValueError):
    """What is wrong with one value."""


class Picture:
    """One image of a row; equal content means an equal `digest`, which is also how it reads as text.

    where  what messages call it: its file, or source, row and column
    Raises `UserError` that names it when it cannot be decoded.
    """

    __slots__ = ("_held", "digest", "where")

    def __init__(self, held: bytes | Path, where: str, digest: str | None = None) -> None:
        self._held, self.where = held, where
        self.digest = digest or hashlib.blake2b(self.read(), digest_size=16).hexdigest()

    def __repr__(self) -> str:
        return f"Picture({self.digest})"

    def __str__(self) -> str:
        return self.digest

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, Picture) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    def read(self) -> bytes:
        """The encoded image."""
        if isinstance(self._held, bytes):
            return self._held
        try:
            return self._held.read_bytes()
        except OSError as problem:
            raise UserError(
                f"The image {self.where} cannot be read: {problem.strerror or problem}."
            ) from None

    def open(self) -> Any:
        """The decoded image in RGB, upright as its camera meant it."""
        with self._decoded() as image:
            try:
                from PIL import ImageOps

                image.load()
                return _rgb(ImageOps.exif_transpose(image))
            except Exception as problem:  # decoders of a dozen formats share no base class of errors
                raise self._broken(problem) from None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) as the header says."""
        with self._decoded() as image:
            width, height = image.size
            return int(width), int(height)

    def _decoded(self) -> Any:
        Image = pillow()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                return Image.open(io.BytesIO(self.read()), formats=FORMATS)
        except UserError:
            raise
        except Exception as problem:  # as above
            raise self._broken(problem) from None

    def _broken(self, problem: Exception) -> UserError:
        text = " ".join(str(problem).split()).rstrip(".")
        reason = "it is no image in a known format" if "cannot identify" in text else text
        return UserError(f"The image {self.where} cannot be read: {reason or type(problem).__name__}.")

    def plain(self) -> dict[str, str]:
        """JSON-ready; read by `from_plain`."""
        held = self._held
        kind, text = (
            ("bytes", base64.b64encode(held).decode()) if isinstance(held, bytes) else ("file", str(held))
        )
        return {"~picture": kind, "held": text, "where": self.where, "digest": self.digest}

    @staticmethod
    def from_plain(value: dict[str, Any]) -> Any:
        """The picture that `plain` described; any other mapping stays as it is."""
        if "~picture" not in value:
            return value
        held = base64.b64decode(value["held"]) if value["~picture"] == "bytes" else Path(value["held"])
        return Picture(held, value["where"], value["digest"])


def pillow() -> Any:
    """The module PIL.Image; UserError where Pillow is not installed."""
    if find_spec("PIL") is None:
        raise UserError(
            'Images are read with the package "pillow", which is not installed: pip install "tunewise[image]"'
        )
    from PIL import Image

    return Image


def _rgb(image: Any) -> Any:
    if image.mode in DEEP:  # Pillow would cut 16 bits off at 255
        import numpy as np

        values = np.asarray(image)
        values = values // 257 if values.max(initial=0) > 255 else values
        image = pillow().fromarray(values.astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are fractions without a known range")
    return image.convert("RGB")


def picture_of(value: Any, where: str) -> Picture | None:
    """The picture that an object is: a PIL image, an array or tensor of bytes [height, width(, channels)].

    Channels may come first. None for anything else.
    """
    home = type(value).__module__.partition(".")[0]
    if home == "PIL" and hasattr(value, "save"):
        return Picture(_png(value), where)
    if home not in ("numpy", "torch") or str(getattr(value, "dtype", "")).split(".")[-1] != "uint8":
        return None
    array = value.detach().cpu().numpy() if home == "torch" else value
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)) or not array.size:
        return None
    return Picture(_png(pillow().fromarray(array)), where)


def _png(image: Any) -> bytes:
    stream = io.BytesIO()
    (image if image.mode in SAVED else image.convert("RGB")).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def is_picture_column(rows: Sequence[Row], name: str) -> bool:
    """Whether every value that the column has is a picture, and there is one."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return bool(values) and all(isinstance(value, Picture) for value in values)


def put_pictures(rows: list[Row], folder: Path, where: str) -> list[tuple[int, str]]:
    """Turns columns of images into pictures, in place; gives (row number, what is wrong) of unusable rows.

    A column holds images when most of its values are encoded images, mappings of `bytes` and `path` as Hugging
    Face datasets writes them, or names of image files; names are those of files inside `folder`, a `Path` object
    may lead anywhere. A column of names of which none is there stays text.
    """
    bad: dict[int, str] = {}
    for name in dict.fromkeys(n for row in rows for n in row):
        values = [row[name] for row in rows if row.get(name) not in (None, "")]
        if not _names_images(values[:TRIED], folder):
            continue
        for number, row in enumerate(rows, start=1):
            if row.get(name) in (None, ""):
                continue
            try:
                row[name] = _picture(row[name], folder, f'{where}, row {number}, "{name}"')
            except NoImage as problem:
                bad.setdefault(number, f'"{name}" {problem}')
    return sorted(bad.items())


def _names_images(values: list[Any], folder: Path) -> bool:
    if not values or sum(map(_looks, values)) * 2 <= len(values):
        return False
    named = [v for v in values if isinstance(v, str)]
    return len(named) < len(values) or any((folder / name).is_file() for name in named if _looks(name))


def _looks(value: Any) -> bool:
    if isinstance(value, (bytes, bytearray)):
        return _is_encoded(bytes(value[:16]))
    if isinstance(value, Mapping):
        held, path = value.get("bytes"), value.get("path")
        return set(value) <= {"bytes", "path"} and (
            isinstance(held, bytes) or (held is None and isinstance(path, str) and _looks(path))
        )
    if isinstance(value, (str, Path)):
        return "://" not in str(value) and str(value).lower().endswith(SUFFIXES)
    return isinstance(value, Picture)


def _is_encoded(start: bytes) -> bool:
    return start.startswith(MAGIC) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")


def _picture(value: Any, folder: Path, where: str) -> Picture:
    if isinstance(value, Picture):
        value.where = where if value.where == GIVEN else value.where
        return value
    if isinstance(value, Mapping):
        held, path = value.get("bytes"), value.get("path")
        value = held if held is not None else path
    if isinstance(value, (bytes, bytearray)):
        if not _is_encoded(bytes(value[:16])):
            raise NoImage("holds bytes that are no image in a known format")
        return Picture(bytes(value), where)
    if not isinstance(value, (str, Path)) or not str(value):
        raise NoImage(f"holds {type(value).__name__}, expected an image")
    return file_picture(Path(value) if isinstance(value, Path) else folder / value, folder, str(value), value)


def file_picture(place: Path, folder: Path, shown: str, given: Any = "") -> Picture:
    """The picture in a file; NoImage when it is missing, no image, or leads out of `folder`."""
    if not isinstance(given, Path) and not place.resolve().is_relative_to(folder.resolve()):
        raise NoImage(f'names "{shown}", which leads out of the folder "{folder}"')
    if not place.is_file():
        raise NoImage(f'names "{shown}", and there is no such file in "{folder}"')
    try:
        with place.open("rb") as stream:
            start = stream.read(16)
    except OSError as problem:
        raise NoImage(f'names "{shown}", which cannot be read: {problem.strerror or problem}') from None
    if not _is_encoded(start):
        raise NoImage(f'names "{shown}", which is no image in a known format')
    return Picture(place.absolute(), str(place))
