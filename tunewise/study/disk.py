"""What a study needs of the disk: one connection, one writer, values as JSON."""

from __future__ import annotations

import json
import math
import os
import socket
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunewise.core.errors import UserError

__all__ = ["SCHEMA", "connect", "first_difference", "short", "sole_writer", "to_json"]

# One trial is one method at one rate, seed and fidelity: the same schedule, computed again, finds its rows again.
SCHEMA = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    """CREATE TABLE trials (
        id INTEGER PRIMARY KEY AUTOINCREMENT, method TEXT NOT NULL, rate REAL, seed INTEGER NOT NULL,
        rung INTEGER NOT NULL, steps INTEGER NOT NULL,
        status TEXT NOT NULL DEFAULT 'waiting' CHECK (status IN ('waiting', 'running', 'done', 'failed')),
        reason TEXT, attempts INTEGER NOT NULL DEFAULT 0, metrics TEXT NOT NULL DEFAULT '{}',
        curve TEXT NOT NULL DEFAULT '[]', directory TEXT NOT NULL DEFAULT '', started REAL, ended REAL,
        cost REAL NOT NULL DEFAULT 0)""",
    "CREATE UNIQUE INDEX trial_key ON trials (method, IFNULL(rate, -1), seed, rung, steps)",
    """CREATE TABLE events (
        id INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL, kind TEXT NOT NULL, text TEXT NOT NULL,
        facts TEXT NOT NULL)""",
)


def connect(file: Path) -> sqlite3.Connection:
    """A connection that writes; every statement is its own transaction unless one was begun."""
    connection = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        # A kill loses no commit either way. FULL keeps them through a power cut too, for a few milliseconds
        # in each of the few commits of a trial, which itself takes seconds to hours.
        connection.execute("PRAGMA synchronous = FULL")
    except BaseException:
        connection.close()
        raise
    return connection


def sole_writer(folder: Path) -> Any:
    """The lock on a study's folder, held; raises `UserError` that names who holds it."""
    from filelock import FileLock, Timeout

    lock, owner = FileLock(folder / ".study.lock", timeout=0, thread_local=False), folder / ".study.owner"
    try:
        lock.acquire()
    except Timeout:
        who = owner.read_text(encoding="utf-8") if owner.is_file() else ""
        raise UserError(
            f"The study {folder} is being written by {who or 'another process'}: wait for its end, stop it, or "
            "choose another --out."
        ) from None
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be written: {error.strerror or error}.") from None
    # Beside the lock, since the one who asks for a lock empties its file.
    part = owner.with_name(".study.owner.part")
    part.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    os.replace(part, owner)
    return lock


def first_difference(old: Any, new: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """Where two trees of plain values differ first: `settings.batch_size`, the old and the new value."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*new, *(n for n in old if n not in new)]:
            found = first_difference(old.get(name), new.get(name), f"{key}.{name}" if key else name)
            if found is not None:
                return found
        return None
    return None if old == new else (key, old, new)


def short(value: Any) -> str:
    """A value as it stands in a sentence."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def to_json(value: Any) -> str:
    """JSON has neither NaN nor numpy's numbers: the first become null, the second plain ones."""

    def clean(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {str(k): clean(v) for k, v in item.items()}
        if isinstance(item, (list, tuple)):
            return [clean(v) for v in item]
        if callable(getattr(item, "item", None)):
            item = item.item()
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return json.dumps(clean(value), ensure_ascii=False, allow_nan=False)
