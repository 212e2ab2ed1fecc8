"""Successive halving over methods and learning rates: many short runs, few long ones, one budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from tunewise.core.errors import UserError
from tunewise.study.budget import show_time
from tunewise.study.portfolio import rates
from tunewise.study.replay import TARGET, Finished, Outcome, Replay, Standing, Trial, largest

__all__ = ["Arm", "Finished", "Outcome", "Plan", "Standing", "Trial"]

LEAST_EPOCHS = 0.1
ENOUGH_EPOCHS = 3.0
MORE_RATES = (9, 5)


@dataclass(frozen=True)
class Arm:
    """A method with the prior of its rate and its speed, measured in a few steps or estimated.

    prior     (low, default, high); empty for a method that is solved in one go and costs `overhead` alone
    step      seconds per optimizer step
    overhead  seconds per trial beside its steps: attaching, validation, the checkpoint
    keep      trained to the end whatever its rank: baselines, and the method that others are tested against
    seeded    gets further seeds whatever its rank: the method that others are tested against
    """

    method: str
    prior: tuple[float, ...]
    step: float
    overhead: float = 0.0
    keep: bool = False
    seeded: bool = False


@dataclass(frozen=True)
class Plan:
    """Rung r: ceil(S / eta^(R - 1 - r)) steps for the best 1 / eta of the configurations of rung r - 1.

    Successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943), one bracket of Hyperband (Li et al.
    2018, arXiv 1603.06560), changed in four ways for comparing methods:

    - Every method has the same number of rates, and its best one stays until all rungs but the last are
      through: settings move a method more than the choice among good methods does, so that a method must not
      be dropped for a bad rate. Places beyond one per method go to the best of the others.
    - All get the same steps, so the same rows in the same order, not the same seconds: seconds are another
      objective of the study, measured beside the quality, and would give a cheap method its advantage twice,
      by an amount that depends on the machine.
    - The last rung trains one configuration of the best `finished` methods (and of those with `keep`) to S
      steps. The best 1 / eta of them (and those with `seeded`) get `seeds` seeds of S steps from the start; what
      time is left goes to seeds of the next ones, then to more seeds of the best.
    - S is what the budget allows. Before each rung it is found anew from the speeds measured until then.
      A further rate is tried only if all methods can have it and the later rungs can still be paid for.

    A trial that continues must learn as if it had never been cut: its learning rate is to be constant until
    the last rung, whose end is known when it begins and which alone may decay it.

    arms            the methods; seconds refer to `workers` running side by side
    budget          seconds; `reserve` of them are kept for what comes afterwards (test rows, report)
    rows            of training data, `batch_size` of them per step: what an epoch is
    configurations  rates per method; None: 3, or 5 or 9 if S stays above three epochs
    Raises `UserError` if the best configuration of a method would get less than a tenth of an epoch before
    the last rung, with the budget that suffices and the methods that fit into this one.
    """

    arms: Sequence[Arm]
    budget: float
    rows: int
    batch_size: int = 32
    seeds: int = 3
    eta: int = 3
    configurations: int | None = None
    finished: int = 8
    most_epochs: float = 10.0
    seed: int = 0
    workers: int = 1
    reserve: float = 0.0

    def __post_init__(self) -> None:
        least = {"rows": 1, "batch_size": 1, "seeds": 1, "eta": 2, "finished": 1, "workers": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UserError(f"{name}={getattr(self, name)} is not valid: at least {low}.")
        if self.configurations is not None and self.configurations < 1:
            raise UserError(f"configurations={self.configurations} is not valid: at least 1.")
        if self.most_epochs < LEAST_EPOCHS:
            raise UserError(f"most_epochs={self.most_epochs} is not valid: at least {LEAST_EPOCHS}.")
        names = [arm.method for arm in self.arms]
        if not names:
            raise UserError("There is no method to compare.")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(f"The method {twice[0]} is given twice.")
        if self.trained and self.length < self.least:
            raise UserError(self._too_short())

    @cached_property
    def trained(self) -> list[Arm]:
        """The methods that take steps."""
        return [arm for arm in self.arms if arm.prior]

    @property
    def last(self) -> int:
        """The rung that trains to the end."""
        return len(self.sizes) - 1

    @property
    def epoch(self) -> float:
        """Steps per epoch."""
        return math.ceil(self.rows / self.batch_size)

    @property
    def usable(self) -> float:
        """Seconds for trials."""
        return self.budget - self.reserve

    @cached_property
    def n(self) -> int:
        """Rates per method."""
        for n in () if self.configurations else MORE_RATES:
            if self._longest(n) >= ENOUGH_EPOCHS * self.epoch:
                return n
        return self.configurations or 3

    @cached_property
    def tried(self) -> dict[str, tuple[float | None, ...]]:
        """The rates of each method, the default first."""
        return {arm.method: rates(arm.prior, self.n) for arm in self.arms}

    @cached_property
    def sizes(self) -> list[int]:
        """Configurations per rung."""
        return self._sizes(self.n)

    @cached_property
    def length(self) -> int:
        """S, the steps of the last rung, as planned before anything has run; 0 if there is no time at all."""
        return self._longest(self.n)

    @property
    def least(self) -> int:
        """The smallest S that gives every method's best configuration a tenth of an epoch."""
        return max(1, math.ceil(LEAST_EPOCHS * self.epoch)) * self.eta

    def lengths(self, longest: int) -> list[int]:
        """Steps that a configuration has behind it after each rung, if the last one has `longest`."""
        return self._lengths(longest, len(self.sizes))

    def _lengths(self, longest: int, rungs: int) -> list[int]:
        found: list[int] = []
        for r in range(rungs):
            found.append(max(found[-1] + 1 if found else 1, math.ceil(longest / self.eta ** (rungs - 1 - r))))
        return found

    def _sizes(self, n: int) -> list[int]:
        methods = len(self.trained)
        sizes = [methods * n]
        while sizes[-1] > methods:
            sizes.append(max(methods, math.ceil(sizes[-1] / self.eta)))
        kept = sum(arm.keep for arm in self.trained)
        return [*sizes, min(methods, max(self.finished, kept))]

    def cost(self, longest: int, n: int | None = None) -> float:
        """Expected seconds of the whole study if the last rung has `longest` steps."""
        sizes = self._sizes(n or self.n)
        solved = sum(arm.overhead for arm in self.arms if not arm.prior)
        prices = [(arm.step, arm.overhead) for arm in self.trained]
        return self.rest(prices, sizes, self._lengths(longest, len(sizes)), 0) + solved / self.workers

    def rest(
        self, prices: Sequence[tuple[float, float]], sizes: list[int], lengths: list[int], before: int
    ) -> float:
        """Expected seconds of the rungs of these sizes and of the seeds, for methods of these prices.

        prices   (seconds per step, seconds per trial) of the methods that may take part
        before   steps that configurations have behind them
        """
        if not prices:
            return 0.0
        step, overhead = (sum(p[i] for p in prices) / len(prices) for i in (0, 1))
        total = 0.0
        for size, length in zip(sizes, lengths, strict=True):
            total += size * (overhead + step * (length - before))
            before = length
        repeated = math.ceil(sizes[-1] / self.eta) * (self.seeds - 1)
        return (total + repeated * (overhead + step * lengths[-1])) / self.workers

    def _longest(self, n: int) -> int:
        return largest(lambda s: self.cost(s, n) <= TARGET * self.usable, self.most_steps)

    @property
    def most_steps(self) -> int:
        """Steps after which more training is not expected to help."""
        return max(self.least, round(self.most_epochs * self.epoch))

    def _too_short(self) -> str:
        needed = self.cost(self.least) / TARGET + self.reserve
        order = sorted(self.trained, key=lambda arm: (not arm.keep, arm.step, arm.overhead))
        solved = [arm for arm in self.arms if not arm.prior]
        fitting: list[str] = []
        for count in range(1, len(order)):
            try:
                fewer = replace(self, arms=[*order[:count], *solved])
            except UserError:
                break
            fitting = [arm.method for arm in fewer.arms]
        fewer_words = f", or compare fewer methods: {', '.join(fitting)}" if fitting else ""
        return (
            f"A budget of {show_time(self.budget)} gives {len(self.trained)} methods less than a tenth of an "
            f"epoch each ({self.rows:,} rows); give --budget {show_time(math.ceil(needed / 60) * 60)}"
            f"{fewer_words}."
        )

    def next_trials(self, finished: Iterable[Finished]) -> list[Trial]:
        """The trials to run now, in this order; none when the study is done.

        A function of the finished rows alone (not of their order, nor of the clock): a study that was killed
        goes on as if it had not been. Ask again after every row; trials that are running are named again.
        """
        return Replay(self, finished).pending

    def outcome(self, finished: Iterable[Finished]) -> Outcome:
        """Who stands where, what failed, what was left out."""
        return Replay(self, finished).outcome()

    def describe(self) -> str:
        """What each method will get, as text."""
        if not self.trained:
            each = ", ".join(f"{arm.method} ({show_time(arm.overhead)})" for arm in self.arms)
            return f"Nothing has a learning rate to be tuned; solved once: {each}."
        lengths = self.lengths(self.length)
        runs = [
            f"{size} configurations to {length:,} steps ({length / self.epoch:.2g} epochs)"
            for size, length in zip(self.sizes, lengths, strict=True)
        ]
        again = math.ceil(self.sizes[-1] / self.eta)
        others = "".join(f" and {arm.method}" for arm in self.trained if arm.seeded)
        seeds = f"; {self.seeds} seeds for the best {again}{others}" if self.seeds > 1 else ""
        expected = self.cost(self.length)
        lines = [
            f"{len(self.trained)} methods, {self.n} learning rates each, equal steps for all: "
            f"{', '.join(runs)}{seeds}.",
            f"Expected {show_time(expected + self.reserve)} of {show_time(self.budget)}"
            + (f" ({show_time(self.reserve)} of it for test rows and report)." if self.reserve else "."),
        ]
        if self.length >= self.most_steps and expected < 0.85 * self.usable:
            lines.append(
                f"The budget is larger than needed: no run is longer than {self.most_epochs:g} epochs."
            )
        width = max(len(arm.method) for arm in self.arms)
        for arm in self.arms:
            tried = self.tried[arm.method]
            shown = ", ".join(f"{rate:g}" for rate in sorted(r for r in tried if r is not None))
            tuning = sum(arm.overhead + arm.step * lengths[0] for _ in tried)
            if arm.prior:
                told = (
                    f"at least {lengths[-2] if len(lengths) > 1 else lengths[-1]:,} steps, at most "
                    f"{lengths[-1]:,}; {len(tried)} x {lengths[0]:,} for its rate ({show_time(tuning)}); "
                    f"rates {shown}"
                )
            else:
                told = f"solved once ({show_time(arm.overhead)})"
            lines.append(f"  {arm.method:<{width}}  {told}")
        return "\n".join(lines)
