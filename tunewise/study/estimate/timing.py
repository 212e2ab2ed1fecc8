"""Seconds of counted operations: each distinct one is executed here and now, on tensors of its shapes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_structure, tree_unflatten

from tunewise.study.estimate.count import Call, Shape, Work

__all__ = ["COLD", "Clock", "now_of", "warm_up"]

# A call is repeated while it is short; one that touches more than LARGE bytes or does more than LONG operations
# is not executed but follows from the rates of the others: an estimate must not take a run's memory or time.
REPEATS, SHORT = 3, 0.05
LARGE, LONG = 2**28, 2e10
# An operation in a run takes longer than alone: its data left the cache, and Python and autograd stand around it.
# The inverse of the median of `time_alone` in benchmarks/results/estimate.json.
COLD = 1.2


def now_of(device: torch.device) -> Callable[[], float]:
    """Seconds so far: one thread's CPU time, which does not see what else the machine does; else the time of day."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.thread_time if alone else time.perf_counter


class Clock:
    """Call -> seconds, each the better of a few tries, so that a busy machine does not look slow.

    `flops` and `seconds` add up what was executed. Values are constants, so only speeds that do not depend on
    values come out right. What cannot be executed alone costs nothing and is named in `skipped`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flops, self.busy, self.skipped = 0.0, 0.0, set[str]()
        self._known: dict[Call, float] = {}
        self._products, self._moved = [0.0, 0.0], 0.0
        self._now = now_of(device)

    @property
    def rate(self) -> float:
        """Floating-point operations per second over all that was executed."""
        return self.flops / self.busy if self.busy else math.nan

    def seconds(self, work: Work) -> float:
        """All operations one after the other."""
        total = COLD * sum(work.calls[call] * self._measured(call) for call in sorted(work.calls, key=_order))
        self.flops, self.busy = self.flops + work.flops, self.busy + total
        return total

    def _measured(self, call: Call) -> float:
        if call.bytes > LARGE or call.flops > LONG:
            return self._followed(call)
        if call not in self._known:
            try:
                self._known[call] = self._run(call)
            except (RuntimeError, IndexError, TypeError):
                self._known[call] = 0.0
                self.skipped.add(str(call.func))
            if call.flops > 1e8:
                self._products[0] += call.flops
                self._products[1] += self._known[call]
        return self._known[call]

    def _followed(self, call: Call) -> float:
        """Seconds by the rate of the products that were executed, and of new memory that is written."""
        if not self._moved:
            shape = Shape((LARGE // 8,), (1,), torch.float32, self.device)
            copy = Call(torch.ops.aten.clone.default, (shape,), tree_structure(((0,), {})))
            self._moved = self._run(copy) / LARGE
        if not self._products[1]:
            shape = Shape((1024, 1024), (1024, 1), torch.float32, self.device)
            product = Call(torch.ops.aten.mm.default, (shape, shape), tree_structure(((0, 0), {})))
            self._products = [2.0 * 1024**3, self._run(product)]
        return call.bytes * self._moved + call.flops * self._products[1] / self._products[0]

    @torch.no_grad()
    def _run(self, call: Call) -> float:
        leaves = [_tensor(leaf) if isinstance(leaf, Shape) else leaf for leaf in call.leaves]
        args, kwargs = tree_unflatten(leaves, call.spec)
        best = math.inf
        for _ in range(REPEATS):
            self._wait()
            start = self._now()
            call.func(*args, **kwargs)
            self._wait()
            best = min(best, self._now() - start)
            if best > SHORT:
                break
        return best

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _order(call: Call) -> int:
    """Small ones first, whose rates the large ones need."""
    return max(call.bytes, call.flops)


def _tensor(shape: Shape) -> Tensor:
    made = torch.empty_strided(shape.size, shape.stride, dtype=shape.dtype, device=shape.device)
    return made.fill_(0.5 if made.is_floating_point() else 1) if 0 not in shape.stride else _expanded(shape)


def _expanded(shape: Shape) -> Tensor:
    """A tensor that repeats itself: filled before it is expanded."""
    size = [1 if s == 0 else n for n, s in zip(shape.size, shape.stride, strict=True)]
    made = torch.empty(size, dtype=shape.dtype, device=shape.device)
    return made.fill_(0.5 if made.is_floating_point() else 1).expand(shape.size)


def warm_up(device: torch.device) -> None:
    """Imports and thread pools that a run has from its first step on."""
    import accelerate  # noqa: F401

    layer = torch.nn.Linear(256, 256).to(device)
    optimizer: Any = torch.optim.AdamW(layer.parameters())
    layer(torch.zeros(256, 256, device=device)).sum().backward()
    optimizer.step()
