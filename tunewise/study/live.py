"""A study while it runs: a table in the terminal, or one line per finished trial where there is none."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tunewise.study.halving import Plan
from tunewise.study.judge.measured import number, validation_metric
from tunewise.study.report.cells import score
from tunewise.study.schedule import MEASURE, Fixed
from tunewise.study.store import Store
from tunewise.study.tables import Trial

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Board", "Line", "Live"]

PER_SECOND = 2
# Below these widths the bar, and the columns beside method, score and state, have no room.
BAR_WIDTH, ALL_COLUMNS = 50, 64
FRAME = 5


@dataclass
class Line:
    """How far one method is; `running` tells of each running trial in words, `measured` is by seed."""

    method: str
    planned: int = 0
    known: set[int] = field(default_factory=set)
    done: int = 0
    failed: int = 0
    best: float | None = None
    lr: float | None = None
    steps: int = 0
    running: dict[int, str] = field(default_factory=dict)
    measured: dict[int, float | None] = field(default_factory=dict)
    reason: str = ""

    @property
    def count(self) -> str:
        """Trials done / known; empty for what is never tuned."""
        known = max(self.planned, len(self.known))
        return f"{self.done}/{known}" if known else ""

    @property
    def state(self) -> str:
        """What it does now, else what is known of it."""
        if self.running:
            return "; ".join(self.running.values())
        said = ""
        if self.measured:
            values = [v for v in self.measured.values() if v is not None]
            said = f"measured {score(sum(values) / len(values))}" if values else "measured"
            said += f" ({len(self.measured)} seeds)" if len(self.measured) > 1 else ""
        if self.failed:
            count = f"{self.failed} failed" if self.done or self.measured else "failed"
            return f"{said}; {count}: {self.reason}" if said else f"{count}: {self.reason}"
        return said or self.reason or ("" if self.done else "waiting")


class Board:
    """The lines of all methods, from the events of a study; safe from any thread."""

    def __init__(self, metric: str, higher_is_better: bool, planned: Mapping[str, int]) -> None:
        self.metric, self.up, self.stage = metric, higher_is_better, "tuning"
        self.lines = {name: Line(name, count) for name, count in planned.items()}
        self.turn = threading.RLock()

    def read(self, trials: Iterable[Trial]) -> None:
        """Takes over what an earlier session of the study did."""
        with self.turn:
            for trial in trials:
                line = self._line(trial)
                if trial.status in ("done", "failed"):
                    self._ended(line, trial)

    def _line(self, trial: Trial) -> Line:
        line = self.lines.setdefault(trial.method, Line(trial.method))
        if trial.rung != MEASURE:
            line.known.add(trial.id)
        return line

    def begin(self, trial: Trial) -> None:
        """A trial runs from now on."""
        with self.turn:
            self.stage = "measuring" if trial.rung == MEASURE else "tuning"
            line = self._line(trial)
            line.reason = line.reason if line.failed else ""
            line.running[trial.id] = _doing(trial)

    def step(self, trial: Trial, step: int, steps: int) -> None:
        """A running trial is at `step` of `steps`; one that has ended meanwhile stays ended."""
        with self.turn:
            line = self._line(trial)
            if trial.id in line.running:
                line.running[trial.id] = _doing(trial, step, steps)
                line.steps = max(line.steps, step)

    def end(self, trial: Trial) -> None:
        """A trial is done, failed, or waits to be tried again."""
        with self.turn:
            line = self._line(trial)
            line.running.pop(trial.id, None)
            if trial.status == "waiting":
                line.reason = line.reason if line.failed else f"waits: {_short(trial.reason)}"
            else:
                self._ended(line, trial)

    def _ended(self, line: Line, trial: Trial) -> None:
        if trial.status == "failed":
            line.failed, line.reason = line.failed + 1, _short(trial.reason)
        elif trial.rung == MEASURE:
            line.measured[trial.seed] = number(trial.metrics.get(self.metric))
        else:
            line.done, line.steps = line.done + 1, max(line.steps, trial.steps)
            value, up = self.validation(trial)[1:]
            if value is not None and (line.best is None or (value > line.best if up else value < line.best)):
                line.best, line.lr = value, trial.rate

    def validation(self, trial: Trial) -> tuple[str, float | None, bool]:
        """(name, value, higher is better) of the score by which a trial was tuned."""
        name, up = validation_metric([trial], self.metric, self.up)
        return name.removeprefix("valid/"), number(trial.metrics.get("score")), up

    def stop(self) -> None:
        """Nothing runs any more."""
        with self.turn:
            for line in self.lines.values():
                if line.running:
                    line.running, line.reason = {}, line.reason or "stopped"

    def sentence(self, trial: Trial) -> str:
        """What a trial that ended came to."""
        who = trial.method if trial.rate is None else f"{trial.method} lr={trial.rate:g} seed {trial.seed}"
        if trial.status == "waiting":
            return f"{who}: waits again, {_short(trial.reason)}"
        if trial.status == "failed":
            return f"{who}: failed: {_short(trial.reason)}"
        if trial.rung == MEASURE:
            value = number(trial.metrics.get(self.metric))
            return f"{who}: measured" + ("" if value is None else f", {self.metric} {score(value)}")
        name, value, _ = self.validation(trial)
        after = f" after {trial.steps:,} steps" if trial.steps else ""
        return f"{who}: " + (f"done{after}" if value is None else f"{name} {score(value)}{after}")


class Live:
    """with Live(store, conductor, on) as live: conductor.watch = live.watch.

    In a terminal a table on stderr, drawn at most twice a second from what `watch` was told, without asking the
    store; elsewhere one line on stderr for each trial that ends. Nothing at all where it is not `on`.
    """

    def __init__(self, store: Store, conductor: Any, on: bool, console: Console | None = None) -> None:
        self.on, self.clock = on, conductor.clock
        self._live: Any = None
        self._over = ""
        if not on:
            return
        from rich.console import Console

        facts = store.get("facts")
        planned = dict.fromkeys(facts.get("methods") or (), 0) | _planned(conductor.schedule)
        self.console = console or Console(stderr=True, highlight=False)
        self.board = Board(str(facts["metric"]), bool(facts["higher_is_better"]), planned)
        self.board.read(store.trials())

    def __enter__(self) -> Live:
        if self.on and self.console.is_terminal and not self.console.is_dumb_terminal:
            from rich.live import Live as Screen

            self._live = Screen(
                console=self.console,
                get_renderable=self.view,
                refresh_per_second=PER_SECOND,
                # What goes into a file while stderr is a terminal must arrive there.
                redirect_stdout=sys.stdout.isatty(),
            )
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._live is not None:
            self.board.stop()
            self._over = "ended" if kind is None else "stopped"
            self._live.stop()

    def watch(self, event: str, facts: Mapping[str, Any]) -> None:
        """ "begin", "step" (from any thread), "end" with {"trial": row, ...}; a "tick" tells nothing new."""
        if not self.on or event == "tick":
            return
        trial: Trial = facts["trial"]
        if event == "begin":
            self.board.begin(trial)
        elif event == "step":
            if "step" in facts:
                self.board.step(trial, int(facts["step"]), int(facts["steps"]))
        else:
            self.board.end(trial)
            if self._live is None:
                said = f"[{_minutes(self.clock.spent)} of {_minutes(self.clock.budget)}] "
                self.console.print(said + self.board.sentence(trial), markup=False, soft_wrap=True)

    def view(self) -> Any:
        """The table, and below it how much of the budget is used."""
        from rich.console import Group

        width = self.console.width
        with self.board.turn:
            lines = list(self.board.lines.values())
            shown = lines if self._over else _most(lines, self.console.height - FRAME)
            table = _table(shown, width, len(lines) - len(shown))
            stage = self._over or self.board.stage
        return Group(table, _budget(stage, self.clock.spent, self.clock.budget, width))


def _planned(schedule: Any) -> dict[str, int]:
    """The trials of each method that are known before any has run."""
    if isinstance(schedule, Fixed):
        return dict(Counter(trial.method for trial in schedule.trials))
    return {name: len(rates) for name, rates in schedule.tried.items()} if isinstance(schedule, Plan) else {}


def _doing(trial: Trial, step: int | None = None, steps: int | None = None) -> str:
    seed = f" seed {trial.seed}" if trial.seed else ""
    if trial.rung == MEASURE:
        return f"measuring{seed}"
    if trial.rate is None or not trial.steps:
        return f"running{seed}"
    place = f"to step {trial.steps}" if step is None else f"step {step}/{steps}"
    return f"lr {trial.rate:g}{seed}, {place}"


def _short(reason: str | None) -> str:
    return " ".join((reason or "no reason known").split()).rstrip(".")


def _minutes(seconds: float) -> str:
    """12:31, 1:02:03."""
    hours, rest = divmod(max(0, round(seconds)), 3600)
    minutes = f"{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
    return f"{hours}:{minutes}" if hours else minutes


def _most(lines: list[Line], room: int) -> list[Line]:
    """As many lines as there is room for: those that run, then those that have come furthest, in their order."""
    if len(lines) <= room:
        return lines
    ranked = sorted(lines, key=lambda line: (not line.running, -len(line.measured), -line.steps))
    kept = {id(line) for line in ranked[: max(1, room - 1)]}
    return [line for line in lines if id(line) in kept]


def _table(lines: list[Line], width: int, more: int) -> Any:
    """One row per line, each on one line of the terminal however narrow it is."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD, expand=True, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    made.add_column("method", no_wrap=True, overflow="ellipsis", max_width=max(8, width // 4))
    whole = width >= ALL_COLUMNS
    for name in ("trials", "valid", "at lr", "steps") if whole else ("valid",):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("state", no_wrap=True, overflow="ellipsis", ratio=1)
    for line in lines:
        best = "" if line.best is None else score(line.best)
        rate = "" if line.lr is None else f"{line.lr:g}"
        steps = f"{line.steps:,}" if line.steps else ""
        cells = (line.count, best, rate, steps) if whole else (best,)
        idle = "red" if line.failed and not line.done and not line.measured else "dim"
        style = "bold" if line.running else idle if not line.measured else ""
        made.add_row(*(Text(cell) for cell in (line.method, *cells, line.state)), style=style)
    if more:
        made.add_row(Text(f"and {more} more"), style="dim")
    return made


def _budget(stage: str, spent: float, budget: float, width: int) -> Any:
    """ "tuning ━━━━━━ 12:31 of 30:00, 17:29 left"."""
    from rich.progress_bar import ProgressBar
    from rich.table import Column, Table
    from rich.text import Text

    used = f"{_minutes(spent)} of {_minutes(budget)}, {_minutes(budget - spent)} left"
    if width < BAR_WIDTH:
        return Text(f"{stage} {used}", no_wrap=True, overflow="ellipsis")
    made = Table.grid(Column(), Column(ratio=1), Column(), padding=(0, 1, 0, 0), expand=True)
    made.add_row(stage, ProgressBar(total=budget, completed=min(spent, budget)), used)
    return made
