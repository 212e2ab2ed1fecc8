"""The job of a worker for most of a study: one trial, from its last checkpoint to its next rung."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tunewise.study.work.commons import Base, encode, features, prepare, read_brief, settings_of, smaller
from tunewise.study.work.curve import Curve
from tunewise.study.work.memory import MIB, held_now, peak_of, size_of, warm_up

__all__ = ["finished", "shared_features", "train"]

LOOKS = 4


def train(
    study: str,
    method: str,
    lr: float | None,
    seed: int,
    steps: int,
    directory: str,
    *,
    last: bool,
    warmup_steps: int = 0,
    decay_from: int | None = None,
    micro_batch: int | None = None,
    row_seconds: float = 0.0,
) -> dict[str, Any]:
    """One trial: from its newest checkpoint in `directory` to `steps`; {"metrics", "curve"}.

    Before the `last` rung the learning rate stays constant and the state at the end is scored; in the last one
    it falls to zero from `decay_from` on, and the best look's state is kept as a finished run.
    row_seconds  of reading one row: what a trial would have cost beside, had it not found frozen features
    """
    from tunewise.backbone import renew
    from tunewise.core.handle import attach
    from tunewise.core.run import Run
    from tunewise.loop.evaluate import evaluate
    from tunewise.machine import PeakMemory, seed_everything

    warm_up(study)
    place = Path(study) / directory
    if last and (found := _finished_before(place, steps)) is not None:
        return found
    prepared, base = prepare(study, method)
    encode(prepared, base, ("train", "valid"))
    seed_everything(seed)
    renew(prepared.model)
    _forget_later(place, steps)
    settings = settings_of(
        study,
        lr=lr,
        **({"steps": steps} if steps else {}),
        warmup_steps=warmup_steps,
        decay_from=decay_from if last else None,
        evaluations=LOOKS if last else 0,
        checkpoint_every=max(1, steps),
        **smaller(study, micro_batch),
        **({} if last else {"schedule": "constant"}),
    )
    before, held = held_now(), size_of(features.values())
    handle = attach(prepared.model, prepared.recipe)
    try:
        task = prepared.data.task
        run = Run(handle, data=prepared.examples, task=task, seed=seed, directory=place, settings=settings)
        run.tokenizer = prepared.tokenizer
        curve = run.listen = Curve(run, steps)
        with (
            PeakMemory(run.device) as memory,
            shared_features(study, run, read_brief(study)[0]["seed"]) as frozen,
        ):
            start = time.perf_counter()
            run.recipe.single("loop").run(run)  # type: ignore[union-attr]
            seconds = curve.kept["training"] or time.perf_counter() - start
            run.listen = lambda row: None
            valid = evaluate(run, prepared.examples["valid"])
        grown = size_of(features.values()) - held if run.device.type == "cpu" else 0
        metrics: dict[str, Any] = {
            "score": valid.get(task.metric),
            **{f"valid/{k}": v for k, v in valid.items()},
            "training": seconds,
            "alone": seconds + row_seconds * _taken_over(run, frozen),
            "peak_memory_mb": peak_of(study, memory.bytes - before - grown, handle, base),
            "trainable": handle.trainable,
            "tokens": curve.kept["tokens"],
            "micro_batch": min(settings.micro_batch or settings.batch_size, settings.batch_size),
            "warmup_steps": warmup_steps,
            "shared_blocks": frozen.blocks,
        }
        if last:
            metrics["decay_from"] = decay_from
            metrics = _keep(prepared, run, seed, place, metrics, curve.thinned())
    finally:
        handle.detach()
    return {"metrics": metrics, "curve": curve.thinned()}


def shared_features(study: str, run: Any, order: int | None = None) -> Any:
    """A `with` block in which the run takes frozen states of rows that this worker has computed before."""
    from tunewise.loop.features import frozen_features

    limit = read_brief(study)[0]["cache_bytes"]
    return frozen_features(run, features, limit_bytes=limit, order=order)


def _taken_over(run: Any, frozen: Any) -> int:
    """Rows whose states were there already, which `tune` would have computed."""
    rows = sum(len(part) for part in run.streams.data.values())
    return max(0, min(rows, frozen.served) - frozen.computed) if frozen.blocks else 0


def _forget_later(place: Path, steps: int) -> None:
    """A checkpoint beyond `steps` belongs to another plan of the same study."""
    for folder in (place / "checkpoints").glob("step-*"):
        if steps and int(folder.name.partition("-")[2]) > steps:
            shutil.rmtree(folder)


def _finished_before(place: Path, steps: int) -> dict[str, Any] | None:
    """The answer of a trial that was killed between its end and its row in the store."""
    from tunewise.record import read_record

    facts = read_record(place) if (place / "run.json").is_file() else {}
    if facts.get("status") != "done" or facts["trial"]["steps"] != steps:
        return None
    return {"metrics": facts["metrics"], "curve": facts["trial"]["curve"]}


def _keep(
    prepared: Any, run: Any, seed: int, place: Path, metrics: dict[str, Any], curve: list[dict[str, Any]]
) -> dict[str, Any]:
    """A run's folder as `tune` leaves it, ready for predict, merge and export; the metrics with its size."""
    from tunewise.machine import environment
    from tunewise.record import Record, folder_size

    record = Record(place)
    identity = {
        "model": prepared.base,
        "data": prepared.data.sha256,
        "method": prepared.recipe.describe(),
        "seed": seed,
        "task": prepared.data.task.describe(),
        "settings": {k: v for k, v in asdict(run.settings).items() if k != "checkpoint_every"},
    }
    extra = {"task": identity["task"], "base": identity["model"]}
    folder = run.handle.save(place / "adaptation", extra=extra)
    metrics = {**metrics, "size_mb": folder_size(folder) / MIB}
    record.facts |= {
        "identity": identity,
        "data": {"name": prepared.data.name, "notes": []},
        "environment": environment(run.device),
        "trial": {"steps": run.extra["trial"]["steps"], "curve": curve},
    }
    record.finish(metrics=metrics, recipe_name=prepared.recipe.name)
    return metrics


@contextmanager
def finished(study: str, method: str, seed: int, directory: str) -> Iterator[tuple[Any, Any, Base]]:
    """(run, prepared, base) of a finished trial, its adaptation on the worker's base model for the time of it."""
    from tunewise.core.handle import restore
    from tunewise.core.run import Run

    warm_up(study)
    prepared, base = prepare(study, method)
    encode(prepared, base, ("train", "valid", "test"))
    handle = restore(prepared.model, Path(study) / directory / "adaptation")
    try:
        prepared.recipe = handle.recipe
        data = {name: prepared.examples[name] for name in ("train", "valid")}
        run = Run(handle, data=data, task=prepared.data.task, seed=seed, settings=settings_of(study))
        run.tokenizer = prepared.tokenizer
        yield run, prepared, base
    finally:
        handle.detach()
