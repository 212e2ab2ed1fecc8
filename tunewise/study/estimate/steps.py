"""Counted training steps and looks at the validation rows, first passes and later ones, extended to a whole run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch

from tunewise.core.run import Run
from tunewise.delta.lean import lean_layers
from tunewise.loop.checkpointing import checkpoint_activations
from tunewise.loop.evaluate import predict_rows
from tunewise.study.estimate.count import Counter, bytes_of
from tunewise.study.estimate.states import Kept
from tunewise.study.estimate.timing import Clock

__all__ = ["Looks", "Steps", "count_looks", "count_steps", "planned"]

Rows = list[dict[str, Any]]


@dataclass
class Steps:
    """Training: seconds and floating-point operations of the mean step.

    In bytes beyond the weights: `peak`, in which the frozen states are that are kept by then; `alive`, the largest
    peak of a step without them; `kept` between steps without them; `states`, the frozen states at the end.
    """

    steps: int
    seconds: float
    flops: float
    peak: float
    alive: int
    kept: int
    states: float
    gradients: int
    moments: int


@dataclass
class Looks:
    """Looks at the validation rows: how many, seconds of the mean one, and bytes as in `Steps`."""

    times: int
    seconds: float
    peak: float
    alive: int


@dataclass
class _Price:
    """Seconds, operations and peak without frozen states of a pass, on straight lines through two sizes."""

    sizes: tuple[int, int]
    seconds: list[float] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)

    def at(self, values: Sequence[float], size: float) -> float:
        """On the line at this number of positions."""
        if self.sizes[0] == self.sizes[1]:
            return values[1]
        share = (size - self.sizes[0]) / (self.sizes[1] - self.sizes[0])
        return values[0] * (1 - share) + values[1] * share


def planned(run: Run) -> tuple[int, list[Rows]]:
    """(number of steps, the batches of the first epoch in their order, no more than there are steps)."""
    settings = run.settings
    stream = run.batches("train", settings.batch_size)
    steps = settings.steps or max(1, round(settings.epochs * len(stream)))
    batches = [[stream.examples[i] for i in rows] for rows in stream.order(0)[:steps]]
    return steps, batches


def count_steps(run: Run, counter: Counter, clock: Clock, states: Kept) -> Steps:
    """Steps on the batch of middle size and on the largest, with rows that are new and with rows that are known."""
    settings = run.settings
    steps, batches = planned(run)
    run.total_steps = steps
    optimizer: Any = run.recipe.single("optimizer")
    checkpoint_activations(run)
    with counter:
        optimizer.setup(run, optimizer.lr or settings.lr)
        run.fire("prepare")
    micro = settings.micro_batch or settings.batch_size
    with lean_layers(run):
        new, known = _prices(
            counter, clock, states, batches, micro, lambda rows: _step(run, counter, optimizer, rows, micro)
        )
    held = run.tensors.optimizer
    moments = bytes_of(
        [v for s in (held.state.values() if held else ()) for v in s.values() if torch.is_tensor(v)]
    )
    grads = [i.tensor.grad for _, i in run.tensors.active() if i.tensor.grad is not None]
    sizes = [_padded(rows, micro) for rows in batches]
    filled, part = _filling(run, states)
    peaks = [
        have + min(new.at(new.peak, size), new.peak[-1]) for have, size in zip(filled, sizes, strict=True)
    ]
    if steps > len(batches):
        peaks.append(filled[-1] + (known if part == 1.0 else new).peak[-1])
    mean, later = sum(sizes) / len(sizes), part * (1 - len(batches) / steps)
    return Steps(
        steps,
        seconds=(1 - later) * new.at(new.seconds, mean) + later * known.at(known.seconds, mean),
        flops=(1 - later) * new.at(new.flops, mean) + later * known.at(known.flops, mean),
        peak=max(peaks),
        alive=new.peak[-1],
        kept=counter.live - states.held,
        states=filled[-1],
        gradients=bytes_of(grads),
        moments=moments,
    )


def count_looks(run: Run, counter: Counter, clock: Clock, states: Kept) -> Looks:
    """Looks at the longest rows and at rows of middle length, a first one and a later one."""
    every, rows = _looked(run)
    if not rows:
        return Looks(0, 0.0, 0, 0)
    times = math.ceil(planned(run)[0] / every)
    order = sorted(rows, key=lambda e: int(e.get("length", 0)))
    size = run.settings.eval_batch_size
    batches = [list(order[i : i + size]) for i in range(0, len(order), size)]

    def look(batch: Rows) -> None:
        with counter:
            predict_rows(run, batch)

    new, known = _prices(counter, clock, states, batches, size, look)
    sizes = [_padded(b, size) for b in batches]
    filled, part = _filling(run, states)
    at_first = filled[min(every, len(filled)) - 1]
    again = known if part == 1.0 else new
    peak = max(at_first + new.peak[-1], filled[-1] + again.peak[-1] if times > 1 else 0)
    mean, later = sum(sizes) / len(sizes), part * (1 - 1 / times)
    seconds = (1 - later) * new.at(new.seconds, mean) + later * known.at(known.seconds, mean)
    return Looks(times, seconds * len(batches), peak, new.peak[-1])


def _prices(
    counter: Counter,
    clock: Clock,
    states: Kept,
    batches: Sequence[Rows],
    micro: int,
    act: Callable[[Rows], None],
) -> tuple[_Price, _Price]:
    """What `act` costs on rows that are new and on rows whose frozen states are kept; the largest comes last."""
    ordered = sorted(batches, key=lambda rows: _padded(rows, micro))
    chosen = (ordered[len(ordered) // 2], ordered[-1])
    sizes = (_padded(chosen[0], micro), _padded(chosen[1], micro))
    prices = [_Price(sizes), _Price(sizes)] if states.blocks else [_Price(sizes)]
    for rows in chosen:
        states.forget()
        for price in prices:
            counter.restart()
            act(rows)
            price.seconds.append(clock.seconds(counter.work))
            price.flops.append(counter.work.flops)
            price.peak.append(counter.peak - states.held)
    return prices[0], prices[-1]


def _step(run: Run, counter: Counter, optimizer: Any, rows: Rows, micro: int) -> None:
    """The step of the plain loop, without its random states and logs."""
    dtype = getattr(torch, run.settings.dtype)
    with counter:
        run.model.train()
        run.handle.frozen_eval()
        parts = [run.collate(rows[i : i + micro]) for i in range(0, len(rows), micro)]
        run.fire("before_step")

        def backward(batch: Any, units: float) -> float:
            with torch.autocast(run.device.type, dtype, enabled=dtype is not torch.float32):
                loss = run.loss(batch, units)
            loss.backward()
            return float(loss.detach())

        optimizer.step(run, parts, 1.0, backward)
        run.step += 1
        run.fire("after_step")


def _looked(run: Run) -> tuple[int, Rows]:
    """(steps between two looks at validation rows, the rows of each); no rows where nothing is looked at."""
    settings, steps = run.settings, planned(run)[0]
    if not settings.evaluations:
        return steps, []
    rows = run.streams.data.get("valid", ())[: settings.valid_rows]
    return max(1, math.ceil(steps / settings.evaluations)), list(rows)


def _filling(run: Run, states: Kept) -> tuple[list[float], float]:
    """(bytes of frozen states after each step of the first epoch and the look after it, the part of all rows whose
    states find room).
    """
    steps, batches = planned(run)
    every, rows = _looked(run)
    seen = list(accumulate(states.bytes("train", b) for b in batches))
    looked = states.bytes("valid", rows)
    wanted = [have + (looked if step >= every else 0) for step, have in enumerate(seen, 1)]
    wanted[-1] = seen[-1] + looked
    part = min(1.0, states.limit / wanted[-1]) if wanted[-1] else 1.0
    return [min(states.limit, have) if states.on_device else 0.0 for have in wanted], part


def _padded(rows: Sequence[dict[str, Any]], micro: int) -> int:
    """Positions that the model computes, padding included."""
    cut = [rows[i : i + micro] for i in range(0, len(rows), micro)]
    return sum(len(part) * max(int(e.get("length", 1)) for e in part) for part in cut)
