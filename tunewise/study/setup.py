"""What a study must know before it can plan: the machine's room, who fits into it, and how fast each method is."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import psutil

from tunewise.core.errors import UserError
from tunewise.core.method import read_recipe
from tunewise.core.recipe import Recipe
from tunewise.prepare import Data
from tunewise.study.budget import Clock, show_memory, show_time
from tunewise.study.store import Store
from tunewise.study.work.commons import objects
from tunewise.study.work.inline import Inline
from tunewise.study.work.workers import Outcome, Pool

__all__ = ["Machine", "Setup", "find_machine"]

MOST_WORKERS = 4
ROOM = 0.9
MIB = 2**20
# glibc then gives every larger block back at once: a fifth less memory, for a quarter to a third more time.
LEAN = {"MALLOC_MMAP_THRESHOLD_": "65536"}
TRY, SILENCE = 600.0, 120.0
SHARE = 0.1  # of the budget that one baseline may take


@dataclass
class Machine:
    """device; `workers` processes of `threads` threads; `memory` bytes that the user allows, None: what is free."""

    device: Any
    workers: int
    threads: int
    memory: int | None

    @property
    def limit(self) -> int | None:
        """Bytes that one worker may take; None on a GPU, whose own memory is the limit."""
        if self.device.type != "cpu" and self.memory is None:
            return None
        room = self.memory or int(ROOM * psutil.virtual_memory().available)
        return room // self.workers


def find_machine(device: str, memory: int | None, workers: int | None) -> Machine:
    """One worker per core and up to four on a CPU, one on a GPU. Raises `UserError` for no workers."""
    from tunewise.machine import pick_device

    target = pick_device(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers is not None and workers < 1:
        raise UserError(f"workers={workers} is not valid: at least 1.")
    count = workers or (min(cores, MOST_WORKERS) if target.type == "cpu" else 1)
    return Machine(target, count, max(1, cores // count), memory)


class Setup:
    """The pool of workers, and what was measured before the plan; kept in the store, so that it is done once."""

    LEAST = 1.0
    REPORT = 10.0

    def __init__(
        self,
        store: Store,
        machine: Machine,
        clock: Clock,
        names: Sequence[str],
        settings: Mapping[str, Any],
        say: Callable[[str], None],
        inline: bool,
    ) -> None:
        self.store, self.machine, self.clock, self.names = store, machine, clock, list(names)
        self.settings, self.say, self.inline = settings, say, inline
        self.known: dict[str, dict[str, Any]] = dict(store.get("speeds", {}))
        self.pool: Any = None

    def __enter__(self) -> Setup:
        if self.inline:
            self.machine.workers = 1
            if self.machine.memory is not None:
                raise UserError(
                    "--memory needs a model, methods and a metric that can be named: objects stay in this process, "
                    "whose memory cannot be limited."
                )
            self.say("Trials run in this process, one at a time: some of what was given are objects.")
            self.pool = Inline()
            return self
        if self.machine.memory is not None:
            self._refuse_too_large()
        # Plans depend on it: a study that goes on keeps its number of workers.
        count = self.store.get("workers")
        if count is None:
            self.store.set("workers", self.machine.workers)
        elif count != self.machine.workers:
            self.say(f"The study was planned for {count} workers and goes on with as many.")
            self.machine.workers = count
        self.pool = self._pool(self.machine.workers, self.machine.limit)
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.close()

    def _pool(self, count: int, limit: int | None) -> Pool:
        # A file of methods that the user named is read by its path in the workers too.
        return Pool(
            count,
            memory_limit=limit,
            threads=self.machine.threads,
            logs=self.store.folder / "logs",
            environment=LEAN if self.machine.memory is not None else None,
        )

    def recipe(self, name: str) -> Recipe:
        """The recipe of a method's name in this study."""
        held = objects.get(str(self.store.folder))
        return read_recipe(held.methods.get(name, name) if held else name)

    def _refuse_too_large(self) -> None:
        """Estimates every method, gives a row to those that do not fit, and as many workers as the others allow."""
        memory = self.machine.memory
        assert memory is not None
        found = self.store.get("needs")
        if found is None:
            self.say("Estimating what memory each method needs.")
            with self._pool(self.machine.workers, None) as pool:
                answers = self._ask(pool, "tunewise.study.work.speed:needs", self.names)
            found = {n: a.value["peak_memory_mb"] for n, a in answers.items() if a.ok}
            self.store.set("needs", found)
        fitting = []
        for name in self.names:
            if found.get(name, 0.0) * MIB > memory:
                reason = f"needs about {show_memory(round(found[name] * MIB))}, and --memory is {show_memory(memory)}"
                self._give_up(name, reason)
            else:
                fitting.append(name)
        if not fitting:
            least = min(found, key=lambda n: found[n])
            raise UserError(
                f"No method fits into --memory {show_memory(memory)}: {least} needs least, about "
                f"{show_memory(round(found[least] * MIB))}."
            )
        largest = max((found.get(name, 0.0) for name in fitting), default=0.0) * MIB
        self.machine.workers = max(1, min(self.machine.workers, int(memory // max(1.0, largest))))
        self.names = fitting

    def _give_up(self, name: str, reason: str) -> None:
        """A row with a reason for a method that takes no part."""
        row = self.store.add(name, None)
        if row.status == "waiting":
            self.store.start(row.id)
            self.store.fail(row.id, reason)
            self.say(f"{name} takes no part: {reason}.")

    def _ask(
        self,
        pool: Any,
        call: str,
        names: Sequence[str],
        key: str = "method",
        more: Mapping[str, dict[str, Any]] | None = None,
    ) -> dict[str, Outcome]:
        """The outcome of one job per name, all at once."""
        study = str(self.store.folder)
        limit = min(TRY, max(1.0, self.clock.deadline))
        jobs: dict[str, Future[Outcome]] = {
            name: pool.submit(
                {"call": call, "args": {"study": study, key: name, **(more or {}).get(name, {})}},
                time_limit=limit,
                silence=SILENCE,
            )
            for name in names
        }
        found = {name: future.result() for name, future in jobs.items()}
        self.store.set("spent", self.clock.spent)
        return found

    def speeds(self) -> dict[str, dict[str, Any]]:
        """What `speed.speed` found for every method that runs at all; the others get a row with the reason."""
        new = [name for name in self.names if name not in self.known]
        if new:
            self.say(f"Timing {len(new)} methods, a few steps each.")
            for name, outcome in self._timed(new).items():
                if outcome.ok:
                    self.known[name] = outcome.value
                else:
                    self.known[name] = {"reason": outcome.reason or outcome.kind}
            if not self.clock.deadline:
                raise UserError(
                    f"The budget of {show_time(self.clock.budget)} was over before the methods were timed: give more."
                )
            if all("reason" in found for found in self.known.values()):  # nothing to keep: it may be mended
                reasons = list(dict.fromkeys(s["reason"] for s in self.known.values()))
                raise UserError(f"No method can run: {'; '.join(reasons[:3])}")
            self.store.set("speeds", self.known)
            for note in dict.fromkeys(n for s in self.known.values() for n in s.get("notes", ())):
                self.store.event("note", note)
        found = {}
        for name in self.names:
            if "reason" in self.known[name]:
                self._give_up(name, self.known[name]["reason"])
            else:
                found[name] = self.known[name]
        return found

    def _timed(self, names: Sequence[str]) -> dict[str, Outcome]:
        """Out of memory: with half as many rows per forward pass, down to one."""
        call, found = "tunewise.study.work.speed:speed", dict[str, Outcome]()
        rows = min(
            self.settings.get("micro_batch") or self.settings["batch_size"], self.settings["batch_size"]
        )
        micro: dict[str, int] = dict(self.store.get("micro", {}))
        left = list(names)
        while left:
            more = {name: {"micro_batch": micro[name]} for name in left if name in micro}
            found |= self._ask(self.pool, call, left, more=more)
            left = [n for n in left if found[n].kind == "memory" and micro.get(n, rows) > 1]
            for name in left:
                micro[name] = micro.get(name, rows) // 2
                self.store.event("memory", f"{name} is tried with {micro[name]} rows per forward pass.")
        self.store.set("micro", {n: m for n, m in micro.items() if n not in found or found[n].ok})
        return found

    def waiting(self, baselines: Sequence[str]) -> dict[str, float]:
        """Expected seconds of the baselines that the base model can be; why it cannot be the others is noted."""
        known: dict[str, dict[str, Any]] = dict(self.store.get("baselines", {}))
        new = [name for name in baselines if name not in known]
        if new:
            outcomes = self._ask(self.pool, "tunewise.study.work.measure:baseline_seconds", new, "name")
            for name, outcome in outcomes.items():
                known[name] = outcome.value if outcome.ok else {"reason": outcome.reason or outcome.kind}
                if "reason" in known[name]:
                    self.store.event(
                        "note", f"No {name.replace('_', '-')} baseline: {known[name]['reason']}."
                    )
            self.store.set("baselines", known)
        most = SHARE * self.clock.budget
        for name, found in known.items():
            if found.get("seconds", 0.0) > most:
                said = f"it would take {show_time(found['seconds'])}, and the budget is {show_time(self.clock.budget)}"
                known[name] = {"reason": said}
                self.store.event("note", f"No {name.replace('_', '-')} baseline: {said}.")
                self.store.set("baselines", known)
        return {name: known[name]["seconds"] for name in baselines if "seconds" in known[name]}

    def measuring(self, name: str, rows: Data) -> float:
        """Expected seconds of a finalist on the test rows, with inference and forgetting."""
        known, count = self.known.get(name, {}), len(rows.splits.test or rows.splits.valid)
        reading, answering = known.get("row", 0.0) * (count + 300), known.get("answer", 0.0) * count
        return float(reading + answering + 2 * self.LEAST)
