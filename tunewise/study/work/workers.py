"""Long-lived worker processes: a job that dies, hangs or eats the memory becomes an outcome in words, no more."""

from __future__ import annotations

import json
import os
import queue
import sys
import tempfile
import threading
from collections.abc import Collection, Mapping
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from tunewise.core.errors import UserError
from tunewise.study.work.supervise import Kind, Outcome, Report, Slot, Task, Worker

__all__ = ["Kind", "Outcome", "Pool"]

THREADS = ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "RAYON")


class Pool:
    """with Pool(2, memory_limit=2 * 2**30) as pool: pool.submit({"call": "package.module:function", "args": {}})

    count         worker processes, each with `threads` threads; they start at once and stay
    memory_limit  bytes of resident memory that one worker may take. The parent looks five times a second: a
                  limit on address space (RLIMIT_AS) would refuse what costs nothing, since torch, CUDA and memory-
                  mapped checkpoints reserve many times what they touch, and Linux ignores RLIMIT_RSS. Memory of
                  processes that a job starts itself, and of a GPU, is not counted.
    allow         modules outside of Tunewise whose functions may be jobs
    logs          a folder for what the workers print; default: a temporary one
    environment   further environment variables of the workers
    """

    def __init__(
        self,
        count: int,
        *,
        memory_limit: int | None = None,
        threads: int = 1,
        allow: Collection[str] = (),
        logs: str | Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        if count < 1 or threads < 1:
            raise UserError(
                f"A pool needs a worker and a thread: {count} workers of {threads} threads are none."
            )
        # -P: a file in the user's folder that is named like a library must not be imported in its place.
        module = "tunewise.study.work.worker_main"
        self.command = [sys.executable, "-P", "-X", "faulthandler", "-m", module, *allow]
        self.environment = {
            **os.environ,
            **{f"{name}_NUM_THREADS": str(threads) for name in THREADS},
            "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false",
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            **(environment or {}),
        }
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        if logs is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="tunewise-")
            logs = self._scratch.name
        self.logs = Path(logs)
        self.logs.mkdir(parents=True, exist_ok=True)
        self.tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self.closing = threading.Event()
        self._turn = threading.Lock()
        self._slots = [
            Slot(self.tasks, self.closing, partial(self._start, number), memory_limit)
            for number in range(count)
        ]
        for slot in self._slots:
            slot.start()

    def _start(self, number: int) -> Worker:
        return Worker(self.command, self.environment, self.logs / f"worker-{number}.log")

    def submit(
        self,
        job: Mapping[str, Any],
        *,
        time_limit: float | None = None,
        silence: float | None = None,
        report: Report | None = None,
    ) -> Future[Outcome]:
        """A future whose result is the `Outcome`; it raises only what `report` raises. Jobs start in order.

        time_limit  seconds that the job may take
        silence     seconds without a sign of life (a report, or work of the processor) after which it hangs
        report      gets what the job reports, in a thread of the pool
        """
        if set(job) != {"call", "args"} or not isinstance(job["args"], dict):
            raise UserError('A job is {"call": "package.module:function", "args": {...}}.')
        try:
            args = json.loads(json.dumps(job["args"]))
        except (TypeError, ValueError) as error:
            raise UserError(f"The arguments of {job['call']} are not plain JSON: {error}.") from None
        task = Task(str(job["call"]), args, time_limit, silence, report, Future())
        with self._turn:
            if self.closing.is_set():
                raise RuntimeError("The pool is closed.")
            self.tasks.put(task)
        return task.future

    @property
    def pids(self) -> list[int]:
        """The processes of the workers that live."""
        workers = [slot.worker for slot in self._slots]
        return [w.process.pid for w in workers if w is not None and w.process.poll() is None]

    def close(self) -> None:
        """Ends all workers now: waiting jobs are cancelled, running ones end as "stopped"."""
        with self._turn:
            self.closing.set()
            with suppress(queue.Empty):  # the only way to know that a queue is empty
                while True:
                    task = self.tasks.get_nowait()
                    if task is not None:
                        task.future.cancel()
            for _ in self._slots:
                self.tasks.put(None)
        for slot in self._slots:
            slot.join()
        if self._scratch is not None:
            self._scratch.cleanup()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
