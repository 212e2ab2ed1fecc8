"""The jobs before a plan: what a method needs and how fast it is."""

from __future__ import annotations

import time
from typing import Any

from tunewise.study.work.commons import encode, prepare, read_brief, settings_of, smaller
from tunewise.study.work.memory import warm_up
from tunewise.task import Task

__all__ = ["needs", "speed"]

SAMPLE, ANSWERS = 64, 4


def needs(study: str, method: str) -> dict[str, float]:
    """What training by a method is expected to take, before any weight is loaded: {"peak_memory_mb"}."""
    from tunewise.study.estimate.estimate import estimate

    facts, splits = read_brief(study)
    found = estimate(
        facts["model"],
        {"train": splits.train, "valid": splits.valid},
        method=method,
        task=Task.from_description(facts["task"]),
        device=facts["device"],
        options={**facts["settings"], "steps": 3},
    )
    return {"peak_memory_mb": found.peak_memory_mb}


def speed(study: str, method: str, seed: int = 0, micro_batch: int | None = None) -> dict[str, Any]:
    """Seconds of a mean step, of the whole of a method that takes no steps, and of reading one row.

    {"step", "solve", "row", "answer": seconds per generated answer, "steps": whether it takes steps, "trainable",
    "peak_memory_mb", "notes"}
    """
    from tunewise.core.handle import attach
    from tunewise.core.run import Run
    from tunewise.loop.evaluate import predict_rows
    from tunewise.machine import seed_everything
    from tunewise.study.estimate.measure import measure

    warm_up(study)
    seed_everything(seed)
    prepared, base = prepare(study, method)
    notes = encode(prepared, base, ("train", "valid"))
    settings = settings_of(study, **smaller(study, micro_batch))
    found = measure(prepared, settings, seed, "")
    handle = attach(prepared.model, prepared.recipe)
    try:
        run = Run(handle, data=prepared.examples, task=prepared.data.task, seed=seed, settings=settings)
        run.tokenizer = prepared.tokenizer
        rows = sorted(prepared.examples["valid"], key=lambda e: int(e.get("length", 0)))
        middle = max(0, (len(rows) - SAMPLE) // 2)
        rows = rows[middle : middle + SAMPLE]  # of mean length, as batches of like length are on the whole
        predict_rows(run, rows[: settings.eval_batch_size])
        start = time.perf_counter()
        predict_rows(run, rows)
        row = (time.perf_counter() - start) / len(rows)
        answer = _answering(run, prepared)
    finally:
        handle.detach()
    return {
        "step": found.step_seconds,
        "solve": 0.0 if found.steps else found.seconds,
        "row": row,
        "answer": answer,
        "steps": bool(found.steps),
        "trainable": found.trainable,
        "peak_memory_mb": found.peak_memory_mb,
        "notes": notes,
    }


def _answering(run: Any, prepared: Any) -> float:
    """Seconds per generated answer, where the metric asks for answers."""
    from tunewise.task import CausalLM, generate

    task, rows = prepared.data.task, prepared.data.splits.valid[:ANSWERS]
    if not isinstance(task, CausalLM) or task.generation_metric is None:
        return 0.0
    start = time.perf_counter()
    generate(run.model, run.tokenizer, rows, task)
    return (time.perf_counter() - start) / len(rows)
