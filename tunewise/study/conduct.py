"""Runs the trials of a study in its workers, keeps what they give, and stays within the budget."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from tunewise.study.budget import Clock
from tunewise.study.replay import Finished, Standing, Trial, key_of
from tunewise.study.schedule import MEASURE, Fixed, Schedule, finished_rows, folder_of
from tunewise.study.store import Store
from tunewise.study.tables import Trial as Row
from tunewise.study.work.workers import Outcome

__all__ = ["Conductor"]

TICK, SAVED = 0.5, 5.0
SILENCE = 120.0
LATER = 5.0  # seconds for the report


class Conductor:
    """pool: anything with `submit(job, time_limit=, silence=, report=) -> Future[Outcome]`.

    watch      called with (trial or None, facts) whenever something happens, for the table in the terminal
    batch      rows per forward pass with which a method begins; halved whenever its memory does not suffice
    reserve    seconds of the budget that tuning leaves to measuring
    speeds     per method: seconds per step and more, measured before; measuring: seconds on the test rows
    """

    def __init__(
        self,
        store: Store,
        pool: Any,
        clock: Clock,
        schedule: Schedule,
        *,
        workers: int,
        batch: int,
        reserve: float = 0.0,
        higher_is_better: bool = True,
        warmup_steps: int = 0,
        steps_per_epoch: float = 1.0,
        speeds: Mapping[str, Mapping[str, Any]] | None = None,
        measuring: Callable[[str], float] = lambda method: 0.0,
        watch: Callable[[str, dict[str, Any]], None] = lambda event, facts: None,
    ) -> None:
        self.store, self.pool, self.clock, self.schedule = store, pool, clock, schedule
        self.workers, self.reserve, self.sign = workers, reserve, higher_is_better
        self.warmup_steps, self.steps_per_epoch = warmup_steps, steps_per_epoch
        self.speeds, self.measuring, self.watch = dict(speeds or {}), measuring, watch
        self.batch, self.micro = batch, dict(store.get("micro", {}))
        self.left_out: list[str] = []
        self.begun = 0
        self._ran: dict[int, int] = {}
        self._places: dict[str, int] = {}
        self._saved = 0.0

    def tune(self) -> None:
        """All trials of the schedule that time allows."""
        self._train(self.schedule.next_trials, self.reserve)

    def _train(self, next_trials: Callable[[Iterable[Finished]], list[Trial]], reserve: float) -> None:
        running: dict[Future[Outcome], tuple[Trial, Row]] = {}
        while True:
            rows = finished_rows(self.store, self.sign)
            busy = {trial.key for trial, _ in running.values()}
            pending = [t for t in next_trials(rows) if t.key not in busy and t.key not in self.left_out]
            for trial in pending[: self.workers - len(running)]:
                if self.clock.may_start(trial.seconds + reserve):
                    future, row = self._begin(trial)
                    running[future] = (trial, row)
                else:
                    self.left_out.append(trial.key)
            if not running:
                if any(t.key not in self.left_out for t in pending):
                    continue
                return
            for future in self._wait(running):
                self._end(*running.pop(future), future.result())

    def _wait(self, running: Mapping[Future[Outcome], Any]) -> set[Future[Outcome]]:
        """Those that ended; the time that the study has taken is kept meanwhile."""
        while True:
            done, _ = wait(running, timeout=TICK, return_when=FIRST_COMPLETED)
            now = time.monotonic()
            if now - self._saved > SAVED or done:
                self._saved = now
                self.store.set("spent", self.clock.spent)
            self.watch("tick", {"spent": self.clock.spent})
            if done:
                return done

    def _place(self, method: str) -> int:
        """The number of a method in the order in which it first came up, kept in the store."""
        known = self._places or {str(k): int(v) for k, v in self.store.get("places", {}).items()}
        if method not in known:
            known[method] = len(known) + 1
            self.store.set("places", known)
        self._places = known
        return known[method]

    def _begin(self, trial: Trial) -> tuple[Future[Outcome], Row]:
        directory = folder_of(self._place(trial.method), trial.method, trial.lr, trial.seed)
        row = self.store.add(
            trial.method, trial.lr, seed=trial.seed, rung=trial.rung, steps=trial.steps, directory=directory
        )
        last = trial.rung == self.schedule.last or not trial.steps
        self._ran[row.id] = self.micro.get(trial.method, self.batch)
        args = {
            "study": str(self.store.folder),
            "method": trial.method,
            "lr": trial.lr,
            "seed": trial.seed,
            "steps": trial.steps,
            "directory": directory,
            "last": last,
            "warmup_steps": self.warmup_steps,
            "decay_from": self._decay_from(trial) if last else None,
            "micro_batch": self.micro.get(trial.method),
            "row_seconds": self.speeds.get(trial.method, {}).get("row", 0.0),
        }
        limit = min(trial.limit, max(1.0, self.clock.deadline - self.reserve / 2))
        return self._submit("tunewise.study.work.trial:train", args, row, limit), row

    def _submit(self, call: str, args: dict[str, Any], row: Row, limit: float) -> Future[Outcome]:
        self.store.start(row.id)
        self.begun += 1
        self.watch("begin", {"trial": row})
        future: Future[Outcome] = self.pool.submit(
            {"call": call, "args": args},
            time_limit=limit if math.isfinite(limit) else None,
            silence=SILENCE,
            report=lambda facts: self.watch("step", {"trial": row, **facts}),
        )
        return future

    def _decay_from(self, trial: Trial) -> int:
        """Where the last rung of the configuration's first seed began: all its seeds have the same schedule."""
        if trial.start:
            return trial.start
        for row in self.store.trials("done"):
            same = (row.method, row.rate, row.rung, row.steps) == (
                trial.method,
                trial.lr,
                trial.rung,
                trial.steps,
            )
            if same and row.metrics.get("decay_from") is not None:
                return int(row.metrics["decay_from"])
        return 0

    def _end(self, trial: Trial, row: Row, outcome: Outcome) -> None:
        if outcome.kind == "stopped":
            self.store.requeue(row.id, "stopped", outcome.seconds)
        elif outcome.kind == "memory" and trial.steps and self._halved(trial.method, self._ran[row.id]):
            rows = self.micro[trial.method]
            said = f"{outcome.reason}; it goes on with {rows} rows per forward pass"
            self.store.event("memory", f"{trial.method}: {said}.", trial=row.id, micro_batch=rows)
            self.store.requeue(row.id, said, outcome.seconds)
        elif outcome.ok:
            value = outcome.value
            self.store.finish(row.id, value["metrics"], value["curve"], outcome.seconds)
        else:
            reason = outcome.reason or outcome.kind
            if outcome.kind == "memory" and trial.steps:
                reason += ", even with one row per forward pass"
            self.store.event("log", f"What trial {row.id} printed last.", trial=row.id, log=outcome.log)
            self.store.fail(row.id, reason, cost=outcome.seconds)
        self.watch("end", {"trial": self.store.trial(row.id)})

    def _halved(self, method: str, ran: int) -> bool:
        """Whether the method can be tried with fewer rows per forward pass than the `ran` that were too many."""
        if self.micro.get(method, self.batch) < ran:  # another trial of it has found out meanwhile
            return True
        if ran <= 1:
            return False
        self.micro[method] = ran // 2
        self.store.set("micro", self.micro)
        return True

    def standings(self) -> list[Standing]:
        """Methods that were trained to the end, best first."""
        rows = finished_rows(self.store, self.sign)
        return [s for s in self.schedule.outcome(rows).standings if s.finished]

    def finalists(self) -> list[Row]:
        """Their trials of the last rung: the first seed of each method, best first, then the further seeds."""
        found: list[tuple[int, int, Row]] = []
        for rank, s in enumerate(self.standings()):
            known: dict[str, Any] = {"method": s.method, "rate": s.lr, "steps": s.steps, "status": "done"}
            own = [t for t in self.store.trials("done") if t.rung != MEASURE and _has(t, known)]
            own = [t for t in own if t.rung == max(t.rung for t in own)]
            found += [(place, rank, t) for place, t in enumerate(sorted(own, key=lambda t: t.seed))]
        return [row for _, _, row in sorted(found, key=lambda item: item[:2])]

    def more_seeds(self, most: int) -> None:
        """Time that is left goes to further seeds of the finalists, best first, trained and measured."""
        while trials := self._further(most):
            self._train(Fixed(trials, self.schedule.last).next_trials, 0.0)
            self.measure({})

    def _further(self, most: int) -> list[Trial]:
        """As many trials as there are workers, which can still be trained and measured; none when time is over."""
        seeds: dict[str, list[Row]] = {}
        for row in self.finalists():
            seeds.setdefault(row.method, []).append(row)
        found = []
        fewest = sorted(seeds.values(), key=len)
        for rows in fewest:
            first, used = rows[0], {row.seed for row in self.store.trials() if row.method == rows[0].method}
            if not first.steps or len(used) >= most:
                continue
            seconds = _whole(first)
            if self.clock.may_start(seconds + self.measuring(first.method) + LATER):
                seed = max(used) + 1
                key = key_of(first.method, first.rate, seed, first.rung)
                found.append(
                    Trial(key, first.method, first.rate, seed, first.rung, 0, first.steps, seconds=seconds)
                )
        return found[: self.workers]

    def measure(self, baselines: Mapping[str, float]) -> None:
        """The test rows, once: baselines (name -> expected seconds), then every finalist that time allows."""
        jobs: list[tuple[Row, str, dict[str, Any], float]] = []
        study = str(self.store.folder)
        for name, seconds in baselines.items():
            row = self.store.add(name, None, rung=MEASURE, directory=f"trials/baselines/{name}")
            args: dict[str, Any] = {"study": study, "name": name, "directory": row.directory}
            jobs.append((row, "tunewise.study.work.measure:baseline", args, seconds))
        timed: set[str] = set()
        for t in self.finalists():
            row = self.store.add(
                t.method, t.rate, seed=t.seed, rung=MEASURE, steps=t.steps, directory=t.directory
            )
            args = {"study": study, "method": t.method, "directory": row.directory}
            args |= {"seed": t.seed, "timed": t.method not in timed}
            timed.add(t.method)
            jobs.append((row, "tunewise.study.work.measure:finalist", args, self.measuring(t.method)))
        self._measure_all([job for job in jobs if job[0].status == "waiting"])

    def _measure_all(self, jobs: list[tuple[Row, str, dict[str, Any], float]]) -> None:
        running: dict[Future[Outcome], Row] = {}
        while jobs or running:
            while jobs and len(running) < self.workers:
                row, call, args, seconds = jobs.pop(0)
                if self.clock.may_start(seconds):
                    running[self._submit(call, args, row, max(1.0, self.clock.deadline - LATER))] = row
                else:
                    said = f"{row.method} (seed {row.seed}) was not measured: no time was left."
                    self.store.event("left out", said, trial=row.id)
            for future in self._wait(running) if running else ():
                self._measured(running.pop(future), future.result())

    def _measured(self, row: Row, outcome: Outcome) -> None:
        if outcome.kind == "stopped":
            self.store.requeue(row.id, "stopped", outcome.seconds)
        elif outcome.ok:
            for note in outcome.value["notes"]:
                if note not in [event["text"] for event in self.store.events("note")]:
                    self.store.event("note", note)
            self.store.finish(row.id, {**self._costs(row), **outcome.value["metrics"]}, cost=outcome.seconds)
        else:
            self.store.event("log", f"What trial {row.id} printed last.", trial=row.id, log=outcome.log)
            self.store.fail(row.id, outcome.reason or outcome.kind, cost=outcome.seconds)
        self.watch("end", {"trial": self.store.trial(row.id)})

    def tidy(self) -> None:
        """Checkpoints are only there to be gone on from."""
        for folder in self.store.folder.glob("trials/*/*/checkpoints"):
            shutil.rmtree(folder)

    def _costs(self, row: Row) -> dict[str, Any]:
        """What the configuration cost over all its rungs; nothing for a baseline, which says it itself."""
        own = [
            t
            for t in self.store.trials("done")
            if (t.method, t.rate, t.seed) == (row.method, row.rate, row.seed) and t.rung != MEASURE
        ]
        if not own:
            return {}
        final = max(own, key=lambda t: t.rung).metrics
        kept = ("trainable", "size_mb", "micro_batch", "warmup_steps", "decay_from")
        return {
            "kind": "tuned",
            "seconds": sum(t.metrics["alone"] for t in own),
            "peak_memory_mb": max(t.metrics["peak_memory_mb"] for t in own),
            "steps": row.steps,
            "epochs": row.steps / self.steps_per_epoch,
            "valid": final.get("score"),
            **{key: final[key] for key in kept if key in final},
        }


def _has(row: Row, values: Mapping[str, Any]) -> bool:
    return all(getattr(row, name) == value for name, value in values.items())


def _whole(row: Row) -> float:
    """Seconds of training another seed from the start, by what the last stretch of this one took."""
    training = float(row.metrics["training"])
    steps = row.steps - int(row.metrics.get("decay_from") or 0)
    return training * row.steps / max(1, steps) + row.cost - training
