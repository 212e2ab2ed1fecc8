"""Jobs in this process, one after another: for models, metrics and methods that no other process can have."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import psutil

from tunewise.study.work.commons import features, objects
from tunewise.study.work.worker_main import failure, find_function, forget
from tunewise.study.work.workers import Outcome

__all__ = ["Inline"]


class Inline:
    """Stands in for `Pool` where nothing can be sent to a worker: no limits of time and memory, one job at once.

    A job that fails is an `Outcome` with a reason as in the pool; Ctrl-C ends the job and is raised.
    """

    pids: tuple[int, ...] = ()

    def submit(
        self,
        job: Mapping[str, Any],
        *,
        time_limit: float | None = None,
        silence: float | None = None,
        report: Callable[[dict[str, Any]], None] | None = None,
    ) -> Future[Outcome]:
        """Runs the job now. Limits cannot be kept here, and what it reports is not heard."""
        future: Future[Outcome] = Future()
        start = time.monotonic()
        try:
            value = find_function(job["call"])(**job["args"])
            found = {"kind": "done", "value": value}
        except Exception as error:
            traceback.print_exc()
            forget()
            found = dict(failure(error))
        seconds = time.monotonic() - start
        peak = psutil.Process().memory_info().rss
        future.set_result(Outcome(seconds=seconds, peak_memory=peak, **found))
        return future

    def close(self) -> None:
        """Forgets the base models and what was computed on them."""
        forget()
        features.clear()
        objects.clear()

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
