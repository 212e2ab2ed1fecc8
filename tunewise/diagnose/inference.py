"""What an adapted model costs when it is used: seconds of its forward passes per 1,000 rows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tunewise.core.delta import forms
from tunewise.core.errors import UserError
from tunewise.core.forward import is_quantized
from tunewise.core.handle import Handle
from tunewise.core.merge import effective, not_mergeable
from tunewise.core.plans import rebuild
from tunewise.core.run import Run

__all__ = ["evaluating", "inference_cost"]

LEAST, MOST = 3, 9
ENOUGH = 1.0


@torch.no_grad()
def inference_cost(run: Run, examples: Sequence[dict[str, Any]]) -> dict[str, float]:
    """{"inference_seconds": seconds per 1,000 rows}: 1,000 / rows times the median of timed forward passes.

    A pass is one batch of `run.settings.eval_batch_size` rows of like length, as evaluation makes them, padded
    to the length that the batches of all examples have on average: where time is a + b * length, that is the
    mean over all of them. It is collated before the clock starts; causal models read rows and generate
    nothing. One pass warms up; then at least three are timed, and up to nine while they take less than a
    second together. With one thread on a CPU the clock is that of the process, which other processes on the
    machine hardly slow down.
    What can be merged is timed as merged, since it would be served so. Merging changes values and adds no layer:
    the time is that of the base's own layers, so no weight is written and no memory taken for it. What
    cannot be merged is timed as it stands. The handle, the modes and the weights are left as they were.
    Raises `UserError` without examples.
    """
    if not examples:
        raise UserError("There are no rows to time the model with.")
    chosen = _typical(examples, int(getattr(run.settings, "eval_batch_size", 64)))
    batch, taken = run.collate(chosen), list[float]()
    with evaluating(run.model), _served(run.handle):
        _pass(run, batch)
        while len(taken) < LEAST or (len(taken) < MOST and sum(taken) < ENOUGH):
            taken.append(_pass(run, batch))
    return {"inference_seconds": statistics.median(taken) * 1000 / len(chosen)}


def _typical(examples: Sequence[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """`size` neighbours by length, the longest of them as long as batches of all rows are on average."""
    ordered = sorted(examples, key=lambda e: (int(e.get("length", 0)), str(e["id"])))
    lengths, size = [int(e.get("length", 0)) for e in ordered], min(size, len(ordered))
    ends = [min(start + size, len(ordered)) for start in range(0, len(ordered), size)]
    mean = sum(lengths[end - 1] * (end - i * size) for i, end in enumerate(ends)) / len(ordered)
    end = min(range(size, len(ordered) + 1), key=lambda e: abs(lengths[e - 1] - mean))
    return ordered[end - size : end]


@contextmanager
def _served(handle: Handle) -> Iterator[None]:
    """Without the deltas that merging would write into the base; existing parameters stay where they are."""
    merged = _mergeable(handle)
    if merged:
        handle.active = False
        rebuild(handle.model)
    try:
        yield
    finally:
        if merged:
            handle.active = True
            rebuild(handle.model)


def _mergeable(handle: Handle) -> bool:
    """Whether every delta can be written into the base, tried one by one, so that no second model is made."""
    found = [(site, t) for _, site, t in handle.sites if set(forms(t.part)) & {"weight", "input", "output"}]
    if not handle.active or not_mergeable(handle) or any(is_quantized(site.module) for site, _ in found):
        return False
    try:
        for site, t in found:
            effective([t], site)
    except UserError:  # the core's way to say that this delta cannot be merged at this site
        return False
    return bool(found)


def _pass(run: Run, batch: Any) -> float:
    alone = run.device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    start = clock()
    run.forward(batch)
    if run.device.type == "cuda":
        torch.cuda.synchronize(run.device)
    return clock() - start


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the time of a `with` block; afterwards every module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
