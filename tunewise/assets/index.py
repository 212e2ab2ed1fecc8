"""The index of demo models and data: name -> package, version, file inside, hashes, licence."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from types import MappingProxyType
from typing import Any, NamedTuple

from tunewise.core.errors import UserError, did_you_mean

__all__ = ["ALIASES", "DATA", "MODELS", "Asset", "FixedSplits", "entry", "fixed_splits"]

ALIASES = {"dinov2": "dinov2-small"}
"""Short names of demo models that name no hub model."""


class FixedSplits(NamedTuple):
    """Exact numbers of train and valid rows; all other rows are test rows."""

    train: int
    valid: int


@dataclass(frozen=True)
class Asset:
    """One demo model or data set; `sha256` is that of `file` inside the package, `archive` of the package."""

    name: str
    description: str
    licence: str
    task: str
    package: str
    version: str
    archive: str
    file: str
    sha256: str
    converter: str
    download_mb: float
    splits: FixedSplits | None = None

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


def _read(section: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Asset]:
    found = {}
    for name, fields in section.items():
        counts = fields.get("splits")
        splits = FixedSplits(*counts) if counts else None
        found[name] = Asset(name=name, **{**fields, "splits": splits})
    return MappingProxyType(found)


_INDEX = tomllib.loads(files(__package__).joinpath("index.toml").read_text(encoding="utf-8"))
MODELS: Mapping[str, Asset] = _read(_INDEX["models"])
DATA: Mapping[str, Asset] = _read(_INDEX["data"])


def entry(name: str, index: Mapping[str, Asset], kind: str) -> Asset:
    """The asset called `name` (a leading `demo:` is allowed); UserError with near names otherwise."""
    plain = name.removeprefix("demo:")
    plain = ALIASES.get(plain, plain)
    if plain not in index:
        raise UserError(f'There is no demo {kind} "{plain}"{did_you_mean(plain, index)}')
    return index[plain]


def fixed_splits(name: str) -> FixedSplits | None:
    """Exact train and valid counts of the demo data `name`; all other rows are test rows."""
    return entry(name, DATA, "data set").splits
