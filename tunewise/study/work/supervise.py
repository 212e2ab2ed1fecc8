"""One worker process and the thread that watches over it: limits of time, silence and memory, and a new one when
it dies.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from tunewise.study.report.cells import duration

__all__ = ["Kind", "Outcome", "Report", "Slot", "Task", "Worker"]

Kind = Literal["done", "refused", "raised", "diverged", "memory", "time", "hung", "crashed", "stopped"]
Report = Callable[[dict[str, Any]], None]

TICK = 0.2
START_LIMIT = 60.0
LIFE = 0.02  # of the time that a job may be silent: this much work of the processor is a sign of life
FULL = 0.75  # of the memory limit: a worker that rests with more starts afresh
TAIL = 4000


@dataclass(frozen=True)
class Outcome:
    """How a job ended: its `value`, or a `kind` of failure with the `reason` in words.

    seconds      from its first line of work to its end
    peak_memory  bytes of resident memory of its worker, the largest of five looks per second
    log          the end of what it printed, with the traceback if it raised
    """

    kind: Kind
    value: Any = None
    reason: str | None = None
    seconds: float = 0.0
    peak_memory: int = 0
    log: str = ""

    @property
    def ok(self) -> bool:
        """Whether the job returned."""
        return self.kind == "done"


@dataclass(frozen=True)
class Task:
    call: str
    args: dict[str, Any]
    time_limit: float | None
    silence: float | None
    report: Report | None
    future: Future[Outcome]


class Worker:
    """One process and the messages that come from it."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("ab") as sink:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                env=environment,
                start_new_session=True,
            )
        self.usage = psutil.Process(self.process.pid)
        self.messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                try:
                    self.messages.put(json.loads(line))
                except ValueError:
                    self.messages.put(
                        {"end": ("crashed", "crashed: it wrote into the channel of its worker")}
                    )
        self.messages.put({"end": None})

    def send(self, message: Mapping[str, Any]) -> bool:
        """Whether the worker was there to take it."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            return False
        return True

    def next(self) -> dict[str, Any] | None:
        """The next message, or None after a tick. A process that a job forked may hold the pipe of a dead worker."""
        for patience in (TICK, 1.0):
            with suppress(queue.Empty):
                return self.messages.get(timeout=patience)
            if self.process.poll() is None:
                return None
        return {"end": None}

    def printed(self) -> int:
        """How much the worker has printed so far, in bytes."""
        return self.log.stat().st_size

    def tail(self, start: int) -> str:
        """The end of what it printed after the first `start` bytes."""
        with self.log.open("rb") as file:
            file.seek(max(start, self.printed() - TAIL))
            return file.read().decode(errors="replace")

    def sample(self) -> tuple[int, float]:
        """Resident bytes and seconds of processor time; zeros if it has just died."""
        try:
            with self.usage.oneshot():
                times = self.usage.cpu_times()
                return self.usage.memory_info().rss, times.user + times.system
        except psutil.Error:
            return 0, 0.0

    def kill(self) -> int:
        """Ends it with all that it started; the exit status."""
        with suppress(ProcessLookupError, PermissionError):  # nobody is left in the group (macOS: a zombie)
            os.killpg(self.process.pid, signal.SIGKILL)
        status = self.process.wait()
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # half a line that it was too dead to read
            self.process.stdin.close()
        return status


class _Watch:
    """What is known of a job while it runs, and what is wrong with it."""

    def __init__(self, worker: Worker, task: Task, memory_limit: int | None) -> None:
        self.worker, self.task, self.memory_limit = worker, task, memory_limit
        self.sent = self.sign = time.monotonic()
        self.begun: float | None = None
        self.looked, self.peak, self.work = 0.0, 0, 0.0

    def begin(self) -> None:
        self.begun = self.sign = time.monotonic()

    @property
    def seconds(self) -> float:
        return 0.0 if self.begun is None else time.monotonic() - self.begun

    def trouble(self) -> tuple[Kind, str] | None:
        """The kind of failure and the reason, as soon as a limit is passed."""
        now, task = time.monotonic(), self.task
        if now - self.looked >= TICK:
            self._look(now)
        if self.memory_limit and self.peak > self.memory_limit:
            return "memory", f"ran out of memory (limit {_binary(self.memory_limit)})"
        if self.begun is None:
            return ("crashed", "its worker did not start") if now - self.sent > START_LIMIT else None
        if task.time_limit is not None and now - self.begun > task.time_limit:
            return "time", f"exceeded its time limit of {duration(task.time_limit)}"
        if task.silence is not None and now - self.sign > task.silence:
            return "hung", f"hung: no sign of life for {duration(task.silence)}"
        return None

    def _look(self, now: float) -> None:
        memory, work = self.worker.sample()
        self.looked, self.peak = now, max(self.peak, memory)
        if work - self.work >= LIFE * (self.task.silence or 0.0):
            self.work, self.sign = work, now


class Slot(threading.Thread):
    """A place in the pool: takes tasks one by one, and always has a worker for the next one."""

    def __init__(
        self,
        tasks: queue.SimpleQueue[Task | None],
        closing: threading.Event,
        start_worker: Callable[[], Worker],
        memory_limit: int | None,
    ) -> None:
        super().__init__(daemon=True)
        self.tasks, self.closing, self.start_worker = tasks, closing, start_worker
        self.memory_limit = memory_limit
        self.worker: Worker | None = None
        self.problem = "it died"

    def run(self) -> None:
        try:
            self._renew()
            while (task := self.tasks.get()) is not None:
                if task.future.set_running_or_notify_cancel():
                    self._serve(task)
        finally:
            self._stop()

    def _serve(self, task: Task) -> None:
        try:
            outcome = self._execute(task)
        except BaseException as error:  # of the task's own `report`: its submitter must see it
            self._stop()
            task.future.set_exception(error)
        else:
            task.future.set_result(outcome)
        if self.worker is None and not self.closing.is_set():
            self._renew()

    def _renew(self) -> None:
        self._stop()
        try:
            self.worker = self.start_worker()
        except OSError as error:  # no memory or no process left: told by the job that needs it
            self.problem = error.strerror or str(error)

    def _stop(self) -> int:
        worker, self.worker = self.worker, None
        return worker.kill() if worker is not None else 0

    def _execute(self, task: Task) -> Outcome:
        """A worker that dies before it has begun is not the job's fault: a second one gets it."""
        for _ in range(2):
            if self.worker is None:
                self._renew()
            outcome = self._attempt(self.worker, task) if self.worker is not None else None
            if outcome is not None:
                return outcome
            self._stop()
        return Outcome("crashed", reason=f"crashed: its worker could not start: {self.problem}")

    def _attempt(self, worker: Worker, task: Task) -> Outcome | None:
        watch, printed, killed = _Watch(worker, task, self.memory_limit), worker.printed(), _oom_kills()
        kind: Kind | None = None
        reason, value = None, None
        if not worker.send({"call": task.call, "args": task.args}):
            return None
        while kind is None:
            message = worker.next() or {}
            if self.closing.is_set():
                kind, reason = "stopped", "stopped: the pool was closed"
            elif "started" in message:
                watch.begin()
            elif "report" in message:
                watch.sign = time.monotonic()
                if task.report is not None:
                    task.report(message["report"])
            elif "kind" in message:
                kind, reason, value = message["kind"], message.get("reason"), message.get("value")
            elif "end" in message:
                if watch.begun is None:
                    self.problem = worker.tail(printed).strip().rpartition("\n")[2] or "it died"
                    return None
                kind, reason = message["end"] or _crash(self._stop(), _oom_kills() > killed)
            if kind is None and (trouble := watch.trouble()) is not None:
                kind, reason = trouble
        seconds = watch.seconds
        if kind not in ("done", "refused", "raised", "diverged") or self._too_full(worker):
            self._stop()
        return Outcome(kind, value, reason, seconds, watch.peak, worker.tail(printed))

    def _too_full(self, worker: Worker) -> bool:
        """What a job leaves behind must not be counted against the next one."""
        return self.memory_limit is not None and worker.sample()[0] > FULL * self.memory_limit


def _crash(status: int, out_of_memory: bool) -> tuple[Kind, str]:
    if status == -signal.SIGKILL and out_of_memory:
        return "memory", "ran out of memory: the system had none left and ended it"
    if status < 0:
        name = signal.strsignal(-status)
        return "crashed", f"crashed: signal {-status}" + (f" ({name})" if name else "")
    return "crashed", f"crashed: it left with exit status {status}"


def _oom_kills() -> int:
    """How many processes Linux has killed so far for want of memory."""
    if not os.path.exists("/proc/vmstat"):
        return 0
    with open("/proc/vmstat") as file:
        return next((int(line.split()[1]) for line in file if line.startswith("oom_kill ")), 0)


def _binary(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
