"""The memory of a study: one folder, one SQLite file, one writer; a kill at any moment loses running trials only."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tunewise.core.errors import RunError, UserError
from tunewise.study.disk import SCHEMA, connect, first_difference, short, sole_writer, to_json
from tunewise.study.tables import Trial, curves_table, trials_table, write_parquet

__all__ = ["Store", "Trial"]

FORMAT = 1
FILE = "study.sqlite"


class Store:
    """with Store.open(folder, identity) as store: one writer; `Store.read(folder)` looks on beside it.

    Every call is one transaction, safe from any thread. A trial goes waiting -> running -> done | failed;
    `requeue` brings it back to waiting. Raises `UserError` for a folder that is no study or another study.
    """

    def __init__(self, folder: Path, connection: sqlite3.Connection, lock: Any = None) -> None:
        self.folder, self._connection, self._lock = folder, connection, lock
        self._turn = threading.RLock()
        connection.row_factory = sqlite3.Row

    @classmethod
    def open(cls, folder: str | Path, identity: Mapping[str, Any]) -> Store:
        """Starts a study, or goes on with the one of the same identity; its running trials wait again.

        A folder in which nothing was tried yet may get another identity.
        """
        folder = Path(folder)
        if (folder / "run.json").is_file():
            raise UserError(f"{folder} already holds a run, which is no study: choose another --out.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"The folder {folder} cannot be written: {error.strerror or error}.") from None
        lock = sole_writer(folder)
        try:
            store = cls(folder, connect(folder / FILE), lock)
            try:
                store._begin(json.loads(to_json(identity)))
            except BaseException:
                store._connection.close()
                raise
        except sqlite3.DatabaseError as error:
            lock.release()
            raise _damaged(folder, error) from None
        except BaseException:
            lock.release()
            raise
        return store

    @classmethod
    def read(cls, folder: str | Path) -> Store:
        """Looks at a study, also while another process writes it; it cannot be changed."""
        file = Path(folder).absolute() / FILE
        if not file.is_file():
            raise UserError(f"{folder} is no study: it has no {FILE}.")
        # Beside a writer SQLite needs its index in the folder; on a medium that nobody can write there is no writer.
        still = "" if os.access(file.parent, os.W_OK) else "&immutable=1"
        connection = None
        try:
            connection = sqlite3.connect(
                f"{file.as_uri()}?mode=ro{still}", uri=True, isolation_level=None, check_same_thread=False
            )
            store = cls(Path(folder), connection)
            store._check_format()
        except sqlite3.DatabaseError as error:
            if connection is not None:
                connection.close()
            raise _damaged(folder, error) from None
        except UserError:
            if connection is not None:
                connection.close()
            raise
        return store

    def _begin(self, identity: dict[str, Any]) -> None:
        with self._write() as run:
            if not run("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone():
                for statement in SCHEMA:
                    run(statement)
                self._name(run, identity)
                return
        self._check_format()
        different = first_difference(self.identity, identity)
        if different is not None:
            if not self._rows("SELECT 1 FROM trials WHERE cost > 0 OR status IN ('done', 'running')"):
                with self._write() as run:  # a plan that was given up before anything was tried
                    for name in ("trials", "events", "meta"):
                        run(f"DELETE FROM {name}")
                    shutil.rmtree(self.folder / "trials", ignore_errors=True)
                    self._name(run, identity)
                return
            key, old, new = different
            raise UserError(
                f"{self.folder} holds a study with another {key}: it was started with {short(old)}, not "
                f"{short(new)}; choose another --out."
            )
        with self._write() as run:
            lost = [row["id"] for row in run("SELECT id FROM trials WHERE status = 'running'")]
            run("UPDATE trials SET status = 'waiting' WHERE status = 'running'")
            self.event("reopened", f"Trials that were running and wait again: {len(lost)}.", trials=lost)

    @staticmethod
    def _name(run: Any, identity: dict[str, Any]) -> None:
        for key, value in {"format": FORMAT, "identity": identity, "created": time.time()}.items():
            run("INSERT INTO meta VALUES (?, ?)", (key, to_json(value)))

    def _check_format(self) -> None:
        found = self.get("format")
        if found != FORMAT:
            raise UserError(f"{self.folder / FILE} has format {found}; this version reads {FORMAT}.")

    @contextmanager
    def _write(self) -> Iterator[Any]:
        if self._lock is None:
            raise RunError(f"The study {self.folder} was opened for reading and cannot be changed.")
        with self._turn:
            if self._connection.in_transaction:
                yield self._connection.execute
                return
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection.execute
                self._connection.execute("COMMIT")
            except BaseException as error:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                if isinstance(error, sqlite3.OperationalError):
                    raise RunError(f"{self.folder / FILE} cannot be written: {error}.") from None
                raise

    def _rows(self, statement: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        with self._turn:
            return self._connection.execute(statement, values).fetchall()

    @property
    def identity(self) -> dict[str, Any]:
        """What the study was started with."""
        found: dict[str, Any] = self.get("identity")
        return found

    def get(self, key: str, default: Any = None) -> Any:
        """A fact about the whole study."""
        rows = self._rows("SELECT value FROM meta WHERE key = ?", (key,))
        return json.loads(rows[0]["value"]) if rows else default

    def set(self, key: str, value: Any) -> None:
        """Keeps a fact about the whole study: the decision, the time used so far."""
        if key in ("format", "identity", "created"):
            raise ValueError(f'"{key}" belongs to the study and cannot be changed.')
        with self._write() as run:
            run("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, to_json(value)))

    def event(self, kind: str, text: str, **facts: Any) -> None:
        """One line of the study's diary."""
        with self._write() as run:
            values = (time.time(), kind, text, to_json(facts))
            run("INSERT INTO events (time, kind, text, facts) VALUES (?, ?, ?, ?)", values)

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The diary, oldest first: time, kind, text, and the facts as further keys."""
        rows = self._rows("SELECT * FROM events WHERE ? IS NULL OR kind = ? ORDER BY id", (kind, kind))
        return [
            {**json.loads(r["facts"]), "time": r["time"], "kind": r["kind"], "text": r["text"]} for r in rows
        ]

    def add(
        self,
        method: str,
        rate: float | None = None,
        *,
        seed: int = 0,
        rung: int = 0,
        steps: int = 0,
        directory: str | None = None,
    ) -> Trial:
        """A new waiting trial, or the one that has this method, rate, seed, rung and steps already.

        `directory` is where it writes, inside the study's folder; trials that go on from another's checkpoint
        share its directory. Default: `trials/<id>`. A rate of None is for what has none, such as baselines.
        """
        key = (method, rate, seed, rung, steps)
        if directory is not None:
            self.inside(directory)
        with self._write() as run:
            found = run(
                "SELECT id FROM trials WHERE method = ? AND rate IS ? AND seed = ? AND rung = ? AND steps = ?",
                key,
            ).fetchone()
            if found:
                return self.trial(found["id"])
            made = run("INSERT INTO trials (method, rate, seed, rung, steps) VALUES (?, ?, ?, ?, ?)", key)
            place = directory if directory is not None else f"trials/{made.lastrowid:04d}"
            run("UPDATE trials SET directory = ? WHERE id = ?", (place, made.lastrowid))
            return self.trial(made.lastrowid)

    def inside(self, directory: str) -> Path:
        """The place in the study's folder; raises `UserError` for one outside of it."""
        whole = (self.folder / directory).resolve()
        if not whole.is_relative_to(self.folder.resolve()):
            raise UserError(
                f'The directory "{directory}" of a trial lies outside of its study {self.folder}.'
            )
        return whole

    def path(self, trial: Trial) -> Path:
        """Where the trial writes; raises `UserError` if the file names a place outside of the study."""
        return self.inside(trial.directory)

    def start(self, id: int) -> Trial:
        """waiting -> running: one more attempt."""
        return self._move(
            id,
            "waiting",
            "status = 'running', attempts = attempts + 1, started = ?, ended = NULL, reason = NULL",
        )

    def finish(
        self, id: int, metrics: Mapping[str, Any], curve: Sequence[Mapping[str, Any]] = (), cost: float = 0.0
    ) -> Trial:
        """running -> done, with what was measured; `cost` in seconds is added to that of earlier attempts."""
        values = (to_json(metrics), to_json(list(curve)), cost)
        change = "status = 'done', ended = ?, metrics = ?, curve = ?, cost = cost + ?"
        return self._move(id, "running", change, *values)

    def fail(
        self,
        id: int,
        reason: str,
        *,
        metrics: Mapping[str, Any] | None = None,
        curve: Sequence[Mapping[str, Any]] = (),
        cost: float = 0.0,
    ) -> Trial:
        """running -> failed, with the reason in words and what was measured before."""
        values = (reason, to_json(metrics or {}), to_json(list(curve)), cost)
        change = "status = 'failed', ended = ?, reason = ?, metrics = ?, curve = ?, cost = cost + ?"
        return self._move(id, "running", change, *values)

    def requeue(self, id: int, reason: str, cost: float = 0.0) -> Trial:
        """running or failed -> waiting, to be tried again; what was measured is dropped."""
        change = "status = 'waiting', ended = ?, reason = ?, metrics = '{}', curve = '[]', cost = cost + ?"
        return self._move(id, "running or failed", change, reason, cost)

    def _move(self, id: int, before: str, change: str, *values: Any) -> Trial:
        with self._write() as run:
            status = self.trial(id).status
            if status not in before.split(" or "):
                raise RunError(f"Trial {id} is {status}, not {before}.")
            run(f"UPDATE trials SET {change} WHERE id = ?", (time.time(), *values, id))
            return self.trial(id)

    def trial(self, id: int) -> Trial:
        """One trial; raises `UserError` if there is none with this number."""
        rows = self._rows("SELECT * FROM trials WHERE id = ?", (id,))
        if not rows:
            raise UserError(f"The study {self.folder} has no trial {id}.")
        return Trial.of(dict(rows[0]))

    def trials(self, status: str | None = None) -> list[Trial]:
        """All trials, or those that are waiting, running, done or failed; oldest first."""
        return [
            Trial.of(dict(r))
            for r in self._rows(
                "SELECT * FROM trials WHERE ? IS NULL OR status = ? ORDER BY id", (status, status)
            )
        ]

    def table(self) -> Any:
        """A DataFrame, one flat row per trial: nested metrics as `a/b`, one named like a column as `metrics/a`."""
        return trials_table(self.trials())

    def curves(self) -> Any:
        """A DataFrame, one row per point of a learning curve, with the trial's id, method, rate, seed and rung."""
        return curves_table(self.trials())

    def export_parquet(self, path: str | Path) -> Path:
        """The table as one Parquet file, written whole."""
        return write_parquet(self.table(), Path(path))

    def close(self) -> None:
        """Ends the access; the next writer may come."""
        self._connection.close()
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _damaged(folder: str | Path, error: sqlite3.DatabaseError) -> UserError:
    return UserError(f"{Path(folder) / FILE} is no study that can be read: {error}.")
