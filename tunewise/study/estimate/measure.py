"""Methods that cannot be counted: a little of the real run is executed and extended to the whole."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from tunewise.core.handle import attach
from tunewise.core.run import Run
from tunewise.loop.settings import Settings
from tunewise.loop.single import Single
from tunewise.machine import PeakMemory
from tunewise.prepare import Prepared
from tunewise.study.estimate.estimate import Estimate, facts
from tunewise.study.estimate.steps import planned

__all__ = ["measure"]

FEW, MORE = 96, 384


def measure(prepared: Prepared, settings: Settings, seed: int, reason: str) -> Estimate:
    """Runs a plain loop for one step and two timed ones, any other loop on few rows and on some more."""
    handle = attach(prepared.model, prepared.recipe, undo=prepared.own_model)
    whole = Run(handle, data=prepared.examples, task=prepared.data.task, seed=seed, settings=settings)
    whole.tokenizer = prepared.tokenizer
    with PeakMemory(whole.device) as memory:
        if isinstance(prepared.recipe.single("loop"), Single):
            steps, each = _steps(whole)
            seconds, about = (
                steps * each,
                "Two steps, extended to all; looks at validation rows are not in it.",
            )
        else:
            steps, each, seconds = 0, 0.0, _passes(whole)
            about = "Passes over few and over more rows, extended to all of them."
    made = Estimate(
        **facts(prepared, whole),
        steps=steps,
        seconds=seconds,
        step_seconds=each,
        peak_memory_mb=memory.bytes / 2**20,
        size_mb=sum(v.numel() * v.element_size() for v in handle.state().values()) / 2**20,
        how="measured",
        reason=reason,
        assumes=[f"Measured on {whole.device} just now. {about}"],
    )
    if prepared.own_model:
        handle.detach()
    return made


def _steps(whole: Run) -> tuple[int, float]:
    """(steps of the run, seconds of a mean one), after a step that is not counted."""
    steps, batches = planned(whole)
    batches.sort(key=_tokens)
    data = {"train": batches[len(batches) // 2] + batches[-1]}
    settings = dataclasses.replace(whole.settings, steps=3, evaluations=0)
    rows: list[tuple[float, float]] = []
    _execute(whole, data, settings, lambda row: rows.append((time.perf_counter(), row.get("tokens", 0))))
    timed = sum(tokens for _, tokens in rows[1:])
    mean = sum(map(_tokens, batches)) / len(batches)
    return steps, (rows[-1][0] - rows[0][0]) / 2 * (2 * mean / timed if timed else 1.0)


def _passes(whole: Run) -> float:
    """Seconds on all rows, on a straight line through two smaller runs; one before them pays for imports."""
    examples = whole.streams.data
    samples = [{n: _sample(list(rows), count) for n, rows in examples.items()} for count in (FEW, FEW, MORE)]
    taken = [_execute(whole, data, whole.settings, lambda row: None) for data in samples]
    few, more, everything = (sum(map(_tokens, d.values())) for d in (samples[1], samples[2], examples))
    if few == more:
        return taken[2] * everything / more
    return max(taken[2], taken[1] + (taken[2] - taken[1]) * (everything - few) / (more - few))


def _execute(whole: Run, data: Any, settings: Any, listen: Any) -> float:
    """Seconds of the recipe's own loop on these rows."""
    run = Run(whole.handle, data=data, task=whole.task, seed=whole.seed, settings=settings)
    run.tokenizer, run.listen = whole.tokenizer, listen
    loop: Any = run.recipe.single("loop")
    start = time.perf_counter()
    loop.run(run)
    return time.perf_counter() - start


def _tokens(rows: Any) -> int:
    return sum(int(e.get("length", 1)) for e in rows)


def _sample(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Rows of every class and of all lengths in their proportions, and the longest, which need most memory."""
    ordered = sorted(rows, key=lambda e: str(e.get("labels")))
    chosen = {e["id"]: e for e in ordered[:: max(1, len(ordered) // count)]}
    longest = sorted(rows, key=lambda e: int(e.get("length", 0)))[-count // 2 :]
    return list((chosen | {e["id"]: e for e in longest}).values())
