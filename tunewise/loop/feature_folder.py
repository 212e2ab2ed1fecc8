"""Frozen states in a folder: what one run has computed, later epochs, runs and processes read."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tunewise.core.errors import UserError

__all__ = ["FeatureFolder"]

Key = tuple[bytes, bytes]
SHARD = 2**26
"""Bytes that are gathered before a file is written."""
SPARE = 2**30
"""Bytes of the disk that are left free."""


class FeatureFolder(MutableMapping[Key, Tensor]):
    """{(mark, row): states} as safetensors files in a folder; a plain dict's stand-in for `frozen_features`.

    A mark is the digest of the configuration, of all weights up to a block (so of the model's revision) and of the
    precision; a row's name is the digest of its encoded ids (so of tokenizer, maximum length and text). What a key
    says is all that the states depend on: nothing stale can be read, and runs on other models, other cuts of the
    text or other data share the folder. Entries are gathered in memory and written as whole files, beside their place
    and renamed; a process that is killed loses what it had not written, and several may write at once. Entries are
    never changed or deleted; whoever wants the room back deletes the folder.
    Raises `UserError` for a folder that holds other files or cannot be written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"Frozen features cannot be kept in {folder}: {error.strerror}.") from None
        if not self.folder.is_dir() or not os.access(self.folder, os.W_OK):
            raise UserError(f"Frozen features cannot be kept in {folder}: it cannot be written.")
        self._files: list[Any] = []
        self._where: dict[Key, int] = {}
        self._new: dict[Key, Tensor] = {}
        self._waiting = 0
        self.nbytes = 0
        for file in sorted(self.folder.iterdir()):
            if file.name.endswith(".safetensors"):
                self._index(file)
            elif not file.name.endswith(".part"):
                raise UserError(f"{folder} holds {file.name}: frozen features need a folder of their own.")

    def _index(self, file: Path) -> None:
        try:
            opened = safe_open(file, "pt")
            names = list(opened.keys())
            keys = [(bytes.fromhex(a), bytes.fromhex(b)) for a, b in (n.split(".") for n in names)]
        except (SafetensorError, ValueError):
            raise UserError(f"{file} holds no frozen features; give them a folder of their own.") from None
        self._files.append(opened)
        self._where |= dict.fromkeys(keys, len(self._files) - 1)
        self.nbytes += file.stat().st_size

    @property
    def room(self) -> int:
        """Bytes that the disk still has for states, kept ones included."""
        return self.nbytes + max(0, shutil.disk_usage(self.folder).free - SPARE)

    def __getitem__(self, key: Key) -> Tensor:
        if key in self._new:
            return self._new[key]
        found: Tensor = self._files[self._where[key]].get_tensor(_name(key))
        return found

    def __setitem__(self, key: Key, value: Tensor) -> None:
        if key in self:
            return
        self._new[key] = value.detach().to("cpu").contiguous()
        self.nbytes += value.nbytes
        self._waiting += value.nbytes
        if self._waiting >= SHARD:
            self.write()

    def __delitem__(self, key: Key) -> None:
        raise UserError(f"Frozen features are never taken out singly; delete the folder {self.folder}.")

    def __iter__(self) -> Iterator[Key]:
        yield from self._where
        yield from self._new

    def __len__(self) -> int:
        return len(self._where) + len(self._new)

    def __contains__(self, key: object) -> bool:
        return key in self._where or key in self._new

    def write(self) -> None:
        """What was gathered becomes a file."""
        if not self._new:
            return
        file = self.folder / f"{uuid.uuid4().hex}.safetensors"
        part = file.with_suffix(".part")
        try:
            save_file({_name(key): value for key, value in self._new.items()}, part)
            part.chmod(
                self.folder.stat().st_mode & 0o666
            )  # safetensors makes files that nobody else may read
            part.replace(file)
        except (OSError, SafetensorError) as error:
            part.unlink(missing_ok=True)
            raise UserError(f"Frozen features cannot be written to {self.folder}: {error}.") from None
        self._files.append(safe_open(file, "pt"))
        self._where |= dict.fromkeys(self._new, len(self._files) - 1)
        self._new, self._waiting = {}, 0


def _name(key: Key) -> str:
    return f"{key[0].hex()}.{key[1].hex()}"
