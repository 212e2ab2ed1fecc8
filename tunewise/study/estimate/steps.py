"""Two counted training steps and two counted looks at the validation rows, extended to a whole run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tunewise.core.run import Run
from tunewise.loop.evaluate import predict_rows
from tunewise.study.estimate.count import Counter, bytes_of
from tunewise.study.estimate.timing import Clock

__all__ = ["Looks", "Steps", "count_looks", "count_steps", "planned"]

Rows = list[dict[str, Any]]


@dataclass
class Steps:
    """Training: seconds and floating-point operations of the mean step, peak and what stays between steps
    (bytes beyond the weights).
    """

    steps: int
    seconds: float
    flops: float
    peak: int
    kept: int
    gradients: int
    moments: int


@dataclass
class Looks:
    """Looks at the validation rows: how many, seconds of each, their peak."""

    times: int
    seconds: float
    peak: int


def planned(run: Run) -> tuple[int, list[Rows]]:
    """(number of steps, the batches of the first epoch in their order, no more than there are steps)."""
    settings = run.settings
    stream = run.batches("train", settings.batch_size)
    steps = settings.steps or max(1, round(settings.epochs * len(stream)))
    batches = [[stream.examples[i] for i in rows] for rows in stream.order(0)[:steps]]
    return steps, batches


def count_steps(run: Run, counter: Counter, clock: Clock) -> Steps:
    """A step on the batch of middle size, then one on the largest, whose peak counts."""
    settings = run.settings
    steps, batches = planned(run)
    run.total_steps = steps
    optimizer: Any = run.recipe.single("optimizer")
    if settings.gradient_checkpointing:
        run.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    with counter:
        optimizer.setup(run, optimizer.lr or settings.lr)
        run.fire("prepare")
    micro = settings.micro_batch or settings.batch_size
    batches.sort(key=lambda rows: _padded(rows, micro))
    sizes = [_padded(rows, micro) for rows in batches]
    middle, largest = batches[len(batches) // 2], batches[-1]
    works = []
    for rows in (middle, largest):
        counter.restart()
        _step(run, counter, optimizer, rows, micro)
        works.append(counter.work)
    held = run.tensors.optimizer
    states = held.state.values() if held is not None else ()
    moments = bytes_of([v for s in states for v in s.values() if torch.is_tensor(v)])
    grads = [i.tensor.grad for _, i in run.tensors.active() if i.tensor.grad is not None]
    points, mean = (sizes[len(sizes) // 2], sizes[-1]), sum(sizes) / len(sizes)
    seconds = _between([clock.seconds(w) for w in works], points, mean)
    flops = _between([w.flops for w in works], points, mean)
    return Steps(steps, seconds, flops, counter.peak, counter.live, bytes_of(grads), moments)


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


def count_looks(run: Run, counter: Counter, clock: Clock, steps: int) -> Looks:
    """All looks of a run; the longest rows are counted, and rows of middle length."""
    settings = run.settings
    rows = run.streams.data.get("valid", ())[: settings.valid_rows]
    if not rows or not settings.evaluations:
        return Looks(0, 0.0, 0)
    times = math.ceil(steps / max(1, math.ceil(steps / settings.evaluations)))
    order = sorted(rows, key=lambda e: int(e.get("length", 0)))
    size = settings.eval_batch_size
    batches = [list(order[i : i + size]) for i in range(0, len(order), size)]
    batches.sort(key=lambda b: _padded(b, size))
    sizes = [_padded(b, size) for b in batches]
    works, peak = [], 0
    for batch in (batches[len(batches) // 2], batches[-1]):
        counter.restart()
        with counter:
            predict_rows(run, batch)
        works.append(counter.work)
        peak = counter.peak
    points, mean = (sizes[len(sizes) // 2], sizes[-1]), sum(sizes) / len(sizes)
    seconds = _between([clock.seconds(w) for w in works], points, mean)
    return Looks(times, seconds * len(batches), peak)


def _padded(rows: Sequence[dict[str, Any]], micro: int) -> int:
    """Positions that the model computes, padding included."""
    cut = [rows[i : i + micro] for i in range(0, len(rows), micro)]
    return sum(len(part) * max(int(e.get("length", 1)) for e in part) for part in cut)


def _between(values: Sequence[float], sizes: tuple[int, int], wanted: float) -> float:
    """A straight line through two counted points."""
    if sizes[0] == sizes[1]:
        return values[1]
    share = (wanted - sizes[0]) / (sizes[1] - sizes[0])
    return values[0] * (1 - share) + values[1] * share
