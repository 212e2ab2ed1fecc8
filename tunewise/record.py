"""What a run leaves behind: run.json, metrics.jsonl, adaptation/, checkpoints/, report.html, each written
whole.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tunewise.core.checkpoint import FORMAT, latest, write_json, write_text
from tunewise.core.errors import UserError

__all__ = ["Record", "folder_size", "read_record"]


class Record:
    """The folder of one run. `begin` refuses before training what would be lost after it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file, self.rows = directory / "run.json", directory / "metrics.jsonl"
        self.facts: dict[str, Any] = {"format": FORMAT}

    def begin(self, identity: dict[str, Any], facts: dict[str, Any], resume: bool) -> str:
        """ "new", "resumed" or "done". Raises `UserError` for an occupied, unwritable or foreign folder."""
        if self.file.is_file():
            old = read_record(self.directory)
            if not resume:
                raise UserError(
                    f"{self.directory} already holds a run: add --resume to go on with it, or choose another --out."
                )
            self._same(old["identity"], identity)
            self.facts = old
            if old.get("status") == "done":
                return "done"
            newest = latest(self.directory / "checkpoints")
            self.prune(int(newest.name.partition("-")[2]) if newest else 0)
            return "resumed"
        if resume and any(self.directory.iterdir()):
            raise UserError(f"{self.directory} holds no run to resume (there is no run.json in it).")
        self.facts |= {"status": "running", "identity": identity, **facts}
        write_json(self.file, self.facts)
        return "new"

    def writable(self) -> None:
        """Raises `UserError` if the folder cannot be written."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.directory):
                pass
        except OSError as error:
            raise UserError(
                f"The folder {self.directory} cannot be written: {error.strerror or error}."
            ) from None

    def room(self, needed: int) -> None:
        """Raises `UserError` when the disk has less than `needed` bytes for checkpoints and results."""
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise UserError(
                f"The disk of {self.directory} has {free / 2**20:,.0f} MiB left and this run may write "
                f"{needed / 2**20:,.0f} MiB: free some space or choose another --out."
            )

    @staticmethod
    def _same(old: dict[str, Any], new: dict[str, Any]) -> None:
        new = json.loads(json.dumps(new))
        for key in new:
            if old.get(key) != new[key]:
                raise UserError(
                    f"This run cannot be resumed with another {key}: it was started with {_short(old.get(key))}, "
                    f"not {_short(new[key])}."
                )

    def write_row(self, row: dict[str, Any]) -> None:
        """One line of metrics.jsonl, flushed."""
        with self.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def prune(self, step: int) -> None:
        """Drops rows after `step`, which a resumed run will write again, and a line that a kill cut in half."""
        if not self.rows.is_file():
            return
        kept = []
        lines = self.rows.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                if number == len(lines):  # cut by a kill; its step is run again
                    continue
                raise UserError(f"{self.rows} is damaged in line {number}: it is no JSON.") from None
            if row.get("step", 0) <= step and "resumed" not in row:
                kept.append(line)
        write_text(self.rows, "".join(line + "\n" for line in kept))

    def finish(self, **facts: Any) -> None:
        """The results; after this the run is done. Checkpoints are no longer needed and go."""
        self.facts |= {"status": "done", **facts}
        write_json(self.file, self.facts)
        shutil.rmtree(self.directory / "checkpoints", ignore_errors=True)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def read_record(directory: str | Path) -> dict[str, Any]:
    """run.json of a run's folder; raises `UserError` where there is none."""
    file = Path(directory) / "run.json"
    if not file.is_file():
        where = Path(directory)
        near = sorted(str(p.parent) for p in where.glob("*/run.json")) if where.is_dir() else []
        hint = f"; did you mean {near[0]}?" if near else "."
        raise UserError(f"{directory} is no run: it has no run.json{hint}")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if found.get("format") != FORMAT:
        raise UserError(f"{file} has format {found.get('format')}; this version reads {FORMAT}.")
    return found


def folder_size(directory: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(os.path.getsize(Path(root) / f) for root, _, files in os.walk(directory) for f in files)
