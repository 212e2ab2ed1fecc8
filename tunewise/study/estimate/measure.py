"""Methods that cannot be counted: a little of the real run is executed and extended to the whole."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from tunewise.core.handle import Handle, attach
from tunewise.core.run import Run
from tunewise.loop.features import frozen_features
from tunewise.loop.settings import Settings
from tunewise.loop.single import Single
from tunewise.machine import PeakMemory
from tunewise.prepare import Prepared
from tunewise.study.estimate.estimate import Estimate, facts
from tunewise.study.estimate.steps import planned

__all__ = ["measure"]

Now = Callable[[], float]
FEW, MORE = 96, 384


def measure(
    prepared: Prepared,
    settings: Settings,
    seed: int,
    reason: str,
    limit_bytes: int | None = None,
    now: Now = time.perf_counter,
) -> Estimate:
    """Runs a plain loop for one step and two timed ones, any other loop on few rows and on some more.

    limit_bytes  what the run may keep of frozen states; None: all blocks are passed every time
    now          seconds by the clock that counts
    """
    handle = attach(prepared.model, prepared.recipe, undo=prepared.own_model)
    try:
        return _measured(prepared, handle, settings, seed, reason, limit_bytes, now)
    finally:
        if prepared.own_model:
            handle.detach()


def _measured(
    prepared: Prepared,
    handle: Handle,
    settings: Settings,
    seed: int,
    reason: str,
    limit_bytes: int | None,
    now: Now,
) -> Estimate:
    whole = Run(handle, data=prepared.examples, task=prepared.data.task, seed=seed, settings=settings)
    whole.tokenizer = prepared.tokenizer
    with PeakMemory(whole.device) as memory:
        if isinstance(prepared.recipe.single("loop"), Single):
            steps, each, kept, room = _steps(whole, limit_bytes, now)
            seconds, about = (
                steps * each,
                "Two steps, extended to all; looks at validation rows are not in it.",
            )
        else:
            steps, each = 0, 0.0
            seconds, kept, room = _passes(whole, limit_bytes, now)
            about = "Passes over few and over more rows, extended to all of them."
    peak = memory.bytes + (room - kept if whole.device.type == "cpu" else 0.0)
    made = Estimate(
        **facts(prepared, whole),
        steps=steps,
        seconds=seconds,
        step_seconds=each,
        peak_memory_mb=peak / 2**20,
        size_mb=sum(v.numel() * v.element_size() for v in handle.state().values()) / 2**20,
        how="measured",
        reason=reason,
        assumes=[f"Measured on {whole.device} just now. {about}"],
    )
    if kept:
        made.assumes.append("The states below everything that is trained are computed once per row and kept.")
    return made


def _steps(whole: Run, limit_bytes: int | None, now: Now) -> tuple[int, float, int, float]:
    """(steps of the run, seconds of a mean one, bytes of frozen states now and in the run), after a step that is not
    counted.

    Of the two steps that are, the first one's rows are new and the second one's are known.
    """
    steps, batches = planned(whole)
    epoch, everything = len(batches), [e for rows in batches for e in rows]
    batches.sort(key=_tokens)
    data = {"train": batches[epoch // 2] + batches[-1]}
    settings = dataclasses.replace(whole.settings, steps=3, evaluations=0)
    rows: list[tuple[float, float]] = []
    limit = limit_bytes if epoch > 1 else None
    _, kept = _execute(
        whole, data, settings, limit, now, lambda row: rows.append((now(), row.get("tokens", 0)))
    )
    mean = _tokens(everything) / epoch
    if not kept:
        timed = sum(tokens for _, tokens in rows[1:])
        return steps, (rows[-1][0] - rows[0][0]) / 2 * (2 * mean / timed if timed else 1.0), 0, 0.0
    new, known = (
        (after - before) * (mean / tokens if tokens else 1.0)
        for (before, _), (after, tokens) in zip(rows, rows[1:], strict=False)
    )
    looked = whole.streams.data.get("valid", ())[: whole.settings.valid_rows]
    wanted, room = _wanted(kept, data, [*everything, *looked], limit)
    later = (1 - epoch / steps) * room / wanted
    return steps, (1 - later) * new + later * known, kept, room


def _passes(whole: Run, limit_bytes: int | None, now: Now) -> tuple[float, int, float]:
    """(seconds on all rows, on a straight line through two smaller runs, after one that pays for imports; bytes of
    frozen states now and in the run).
    """
    examples = whole.streams.data
    samples = [{n: _sample(list(rows), count) for n, rows in examples.items()} for count in (FEW, FEW, MORE)]
    done = [_execute(whole, data, whole.settings, limit_bytes, now, lambda row: None) for data in samples]
    few, more, everything = (sum(map(_tokens, d.values())) for d in (samples[1], samples[2], examples))
    (_, (first, _), (second, kept)) = done
    _, room = _wanted(kept, samples[2], [e for rows in examples.values() for e in rows], limit_bytes)
    if few == more:
        return second * everything / more, kept, room
    return max(second, first + (second - first) * (everything - few) / (more - few)), kept, room


def _wanted(kept: int, data: Any, rows: Any, limit_bytes: int | None) -> tuple[float, float]:
    """Bytes of frozen states of `rows`, where those of `data` are `kept`; and what of them finds room."""
    wanted = kept * _tokens(rows) / sum(map(_tokens, data.values()))
    return wanted, max(kept, min(wanted, limit_bytes or 0))


def _execute(
    whole: Run, data: Any, settings: Any, limit_bytes: int | None, now: Now, listen: Any
) -> tuple[float, int]:
    """(seconds of the recipe's own loop on these rows, bytes of frozen states that it has kept)."""
    run = Run(whole.handle, data=data, task=whole.task, seed=whole.seed, settings=settings)
    run.tokenizer, run.listen = whole.tokenizer, listen
    loop: Any = run.recipe.single("loop")
    aside: Any = nullcontext()
    if limit_bytes is not None:
        aside = frozen_features(run, {}, limit_bytes=limit_bytes, order=whole.seed)
    with aside as features:
        start = now()
        loop.run(run)
        return now() - start, 0 if features is None else features.used


def _tokens(rows: Any) -> int:
    return sum(int(e.get("length", 1)) for e in rows)


def _sample(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Rows of every class and of all lengths in their proportions, and the longest, which need most memory."""
    ordered = sorted(rows, key=lambda e: str(e.get("labels")))
    chosen = {e["id"]: e for e in ordered[:: max(1, len(ordered) // count)]}
    longest = sorted(rows, key=lambda e: int(e.get("length", 0)))[-count // 2 :]
    return list((chosen | {e["id"]: e for e in longest}).values())
