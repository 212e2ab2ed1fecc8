"""What the finished rows of a study say: which trials come next, and who stands where."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tunewise.study.budget import TOLERANCE

if TYPE_CHECKING:
    from tunewise.study.halving import Plan

__all__ = ["TARGET", "Finished", "Outcome", "Replay", "Standing", "Trial", "key_of", "largest"]

TARGET = 0.97  # of the budget is planned for: speeds are known to a few percent
LATEST = 1.01  # nothing is started that is expected to end later than this share of the budget


@dataclass(frozen=True)
class Trial:
    """One configuration from step `start` to step `steps`; `after` is the trial whose checkpoint goes on.

    seconds  expected; limit: after so many it must be stopped, or the budget would not be kept
    """

    key: str
    method: str
    lr: float | None
    seed: int
    rung: int
    start: int
    steps: int
    after: str | None = None
    seconds: float = 0.0
    limit: float = math.inf


@dataclass(frozen=True)
class Finished:
    """What became of a trial. score: higher is better, None or not finite where it failed, with a reason.

    seconds  of the whole trial; training: of its steps alone
    """

    key: str
    score: float | None
    seconds: float
    training: float
    reason: str | None = None

    @property
    def failed(self) -> bool:
        """Whether there is no score to go by."""
        return self.reason is not None or self.score is None or not math.isfinite(self.score)


@dataclass(frozen=True)
class Standing:
    """How far a method came: its best configuration, the keys of that configuration's last trials by seed."""

    method: str
    lr: float | None
    steps: int
    finished: bool
    scores: dict[int, float]
    keys: dict[int, str]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return sum(self.scores.values()) / len(self.scores)


@dataclass(frozen=True)
class Outcome:
    """standings, best first and finished ones before others; failed methods with the reasons; the rest.

    left_out  trials for which no time was left
    done      whether nothing is left to run
    """

    standings: list[Standing]
    failed: dict[str, list[str]]
    left_out: list[Trial]
    spent: float
    done: bool


def key_of(method: str, lr: float | None, seed: int, rung: int) -> str:
    """What a trial is called; the same trial of the same plan always has the same name."""
    return f"{method}{'' if lr is None else f' lr={lr:g}'} seed={seed} rung={rung}"


def largest(allowed: Callable[[int], bool], most: int) -> int:
    """The largest of 1 .. most that is allowed, where all below an allowed one are; 0 if none is."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if allowed(middle) else (low, middle - 1)
    return low


class Replay:
    """Walks through a plan along the rows that are there, until a trial has no row.

    Every decision uses the rows of completed stages alone. Trials of one stage are handed to free workers in
    order, which gives the time that the study has taken without a clock.
    """

    def __init__(self, plan: Plan, finished: Iterable[Finished]) -> None:
        self.plan, self.rows = plan, {row.key: row for row in finished}
        self.spent, self.complete = 0.0, False
        self.trials: dict[str, Trial] = {}
        self.pending: list[Trial] = []
        self.left_out: list[Trial] = []
        self.speeds = {arm.method: (arm.step, arm.overhead) for arm in plan.arms}
        solved = [self._trial(arm.method, None, 0, 0, 0) for arm in plan.arms if not arm.prior]
        if self._stage(solved) and self._first_rung():
            last = len(plan.sizes) - 1
            if all(self._rung(rung) for rung in range(1, last + 1)):
                self._stage(self._seeds(last))

    def outcome(self) -> Outcome:
        """Standings, failures and what was left out."""
        standings, failed = [], {}
        for arm in self.plan.arms:
            own = [t for t in self.trials.values() if t.method == arm.method and t.key in self.rows]
            good = [t for t in own if not self.rows[t.key].failed]
            if good:
                standings.append(self._standing(good))
            elif own:
                failed[arm.method] = [str(self.rows[t.key].reason or "no finite score") for t in own]
        standings.sort(key=lambda s: (not s.finished, -s.mean, s.method))
        return Outcome(standings, failed, self.left_out, self.spent, not self.pending)

    def _standing(self, good: list[Trial]) -> Standing:
        first = max(
            (t for t in good if t.seed == self.plan.seed), key=lambda t: (t.rung, self._score(t), t.key)
        )
        runs = [first, *(t for t in good if t.seed != self.plan.seed)]
        finished = first.lr is None or first.rung == len(self.plan.sizes) - 1
        scores = {t.seed: self._score(t) for t in runs}
        return Standing(first.method, first.lr, first.steps, finished, scores, {t.seed: t.key for t in runs})

    def _score(self, trial: Trial) -> float:
        return float(self.rows[trial.key].score or 0.0)

    def _trial(
        self, method: str, lr: float | None, rung: int, steps: int, seed: int, after: Trial | None = None
    ) -> Trial:
        start = after.steps if after else 0
        step, overhead = self.speeds[method]
        return Trial(
            key=key_of(method, lr, self.plan.seed + seed, rung),
            method=method,
            lr=lr,
            seed=self.plan.seed + seed,
            rung=rung,
            start=start,
            steps=steps,
            after=after.key if after else None,
            seconds=overhead + step * (steps - start),
        )

    def _stage(self, trials: Sequence[Trial]) -> bool:
        """Whether all trials that time allows have a row; if not, they are pending."""
        plan, waiting, left_out = self.plan, [], []
        free = [self.spent] * plan.workers
        for trial in trials:
            row, begin = self.rows.get(trial.key), free[0]
            if row is None and begin + trial.seconds > LATEST * plan.usable:
                left_out.append(trial)
                continue
            heapq.heapreplace(free, begin + (row.seconds if row else trial.seconds))
            self.trials[trial.key] = trial
            if row is None:
                most = TOLERANCE * plan.usable - begin
                waiting.append(replace(trial, limit=min(most, 3 * trial.seconds + 60)))
        self.pending = waiting
        if waiting:
            return False
        self.left_out += left_out
        self.spent = max(free)
        self._measure({t.method for t in trials})
        return True

    def _measure(self, methods: set[str]) -> None:
        """Speeds from all rows so far that have a score."""
        for method in methods:
            own = [t for t in self.trials.values() if t.method == method and not self.rows[t.key].failed]
            steps = sum(t.steps - t.start for t in own)
            if own:
                training = sum(self.rows[t.key].training for t in own)
                total = sum(self.rows[t.key].seconds for t in own)
                self.speeds[method] = (training / steps if steps else 0.0, (total - training) / len(own))

    def _first_rung(self) -> bool:
        """One rate of every method after another, while the later rungs can still be paid for."""
        plan = self.plan
        steps = plan.lengths(plan.length)[0]
        later = plan.lengths(max(plan.least, plan.eta * steps))[1:]
        for i in range(plan.n):
            tried = [(arm.method, plan.tried[arm.method]) for arm in plan.trained]
            stage = [self._trial(m, known[i], 0, steps, 0) for m, known in tried if i < len(known)]
            rest = plan.rest(list(self._prices()), plan.sizes[1:], later, steps)
            price = sum(t.seconds for t in stage) / plan.workers
            if i and self.spent + price + rest > plan.usable:
                return True
            if not self._stage(stage):
                return False
            if self.left_out:
                return False
        return True

    def _prices(self) -> Iterable[tuple[float, float]]:
        return (self.speeds[arm.method] for arm in self.plan.trained)

    def _rung(self, rung: int) -> bool:
        """The survivors of the rung below; a method whose last one fails gets its next best instead."""
        plan, last = self.plan, len(self.plan.sizes) - 1
        members = self._chosen(rung, last)
        if not members:
            return False
        methods = [t.method for t in members]
        before = max(t.steps for t in members)
        prices = [self.speeds[m] for m in methods]

        def lengths(longest: int) -> list[int]:
            fixed: list[int] = []
            for length in plan.lengths(longest)[rung:]:
                fixed.append(max(length, (fixed[-1] if fixed else before) + 1))
            return fixed

        def cost(longest: int) -> float:
            own, *later = lengths(longest)
            now = sum(o + s * (own - t.steps) for (s, o), t in zip(prices, members, strict=True))
            if later:
                return now / plan.workers + plan.rest(prices, plan.sizes[rung + 1 :], later, own)
            again = sorted((o + s * own for s, o in prices), reverse=True)
            repeated = sum(again[: math.ceil(len(members) / plan.eta)]) * (plan.seeds - 1)
            return (now + repeated) / plan.workers

        longest = largest(lambda s: self.spent + cost(s) <= TARGET * plan.usable, plan.most_steps)
        steps = lengths(longest)[0]
        stage = [self._trial(t.method, t.lr, rung, steps, 0, t) for t in members]
        while stage:
            if not self._stage(stage):
                return False
            stage = self._instead(rung, steps)
        return not self.left_out

    def _good(self, rung: int) -> list[Trial]:
        """Trials of a rung that have a score, best first."""
        own = [t for t in self.trials.values() if t.rung == rung and t.lr is not None]
        return sorted((t for t in own if not self.rows[t.key].failed), key=lambda t: (-self._score(t), t.key))

    def _chosen(self, rung: int, last: int) -> list[Trial]:
        below = self._good(rung - 1)
        best = list({t.method: t for t in reversed(below)}.values())
        best.sort(key=lambda t: (-self._score(t), t.key))
        if rung == last:
            kept = {arm.method for arm in self.plan.trained if arm.keep}
            best.sort(key=lambda t: t.method not in kept)
            return best[: self.plan.sizes[rung]]
        taken = {t.key for t in best}
        others = [t for t in below if t.key not in taken]
        return best + others[: max(0, self.plan.sizes[rung] - len(best))]

    def _instead(self, rung: int, steps: int) -> list[Trial]:
        """The next best configuration of each method that has none left in this rung, if there is one."""
        found = []
        tried = [t for t in self.trials.values() if t.rung == rung and t.lr is not None]
        alive = {t.method for t in tried if not self.rows[t.key].failed}
        out = {(t.method, t.lr) for t in self.trials.values() if self.rows[t.key].failed}
        for method in dict.fromkeys(t.method for t in tried if t.method not in alive):
            for below in range(rung - 1, -1, -1):
                rest = [t for t in self._good(below) if t.method == method and (method, t.lr) not in out]
                if rest:
                    found.append(self._trial(method, rest[0].lr, rung, steps, 0, rest[0]))
                    break
        return found

    def _seeds(self, last: int) -> list[Trial]:
        """Further seeds: seed by seed for the finalists, then method by method for the others.

        The length was chosen for the dearest finalists. Where cheaper ones came out, their further seeds use
        what time is left, unless the length was capped and everything is finished.
        """
        plan, ranked = self.plan, self._good(last)
        best = math.ceil(len(ranked) / plan.eta)
        seeded = {arm.method for arm in plan.trained if arm.seeded}
        final = [t for place, t in enumerate(ranked) if place < best or t.method in seeded]
        pairs = [(t, seed) for seed in range(1, plan.seeds) for t in final]
        pairs += [(t, seed) for t in ranked if t not in final for seed in range(1, plan.seeds)]
        if plan.seeds > 1 and final and final[0].steps < plan.most_steps:
            pairs += [(t, seed) for seed in range(plan.seeds, 3 * plan.seeds) for t in final]
        return [self._trial(t.method, t.lr, last, t.steps, seed) for t, seed in pairs]
