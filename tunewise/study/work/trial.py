"""The jobs of a study's workers: how fast a method is, one trial of it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tunewise.study.work.commons import Base, encode, features, prepare, read_brief
from tunewise.study.work.worker_main import report
from tunewise.task import Task

__all__ = ["Curve", "finished", "needs", "shared_features", "speed", "train", "weights_of"]

LOOKS = 4
POINTS = 200
SIGN = 0.3
SAMPLE = 64
MIB = 2**20

_libraries: dict[str, int] = {}


def warm_up(study: str) -> None:
    """Imports what trials need, and looks what memory that takes, before a base model is loaded."""
    if _libraries:
        return
    import accelerate  # noqa: F401
    import sklearn.linear_model  # noqa: F401
    import torch
    import transformers  # noqa: F401

    import tunewise.loop.probe  # noqa: F401
    from tunewise.machine import resident

    torch.zeros(2, 2).requires_grad_().sum().backward()
    read_brief(study)
    _libraries["bytes"] = resident()


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


def _settings(study: str, **own: Any) -> Any:
    from tunewise.loop.settings import Settings

    return Settings.of(**{**read_brief(study)[0]["settings"], **own})


def speed(study: str, method: str, seed: int = 0) -> dict[str, Any]:
    """Seconds of a mean step, of the whole of a method that takes no steps, and of reading one row.

    {"step", "solve", "row", "steps": whether it takes steps, "trainable", "peak_memory_mb", "notes"}
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
    settings = _settings(study, epochs=1.0)
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
    finally:
        handle.detach()
    return {
        "step": found.step_seconds,
        "solve": 0.0 if found.steps else found.seconds,
        "row": row,
        "steps": bool(found.steps),
        "trainable": found.trainable,
        "peak_memory_mb": found.peak_memory_mb,
        "notes": notes,
    }


class Curve:
    """Rows of a run's log: kept for the learning curve, told to the parent, and timed between two steps."""

    def __init__(self, steps: int) -> None:
        self.rows: list[dict[str, Any]] = []
        self.training, self.tokens, self.taken, self.steps = 0.0, 0, 0, steps
        self._last = self._told = time.perf_counter()

    def __call__(self, row: dict[str, Any]) -> None:
        now = time.perf_counter()
        if "loss" in row:
            self.training += now - self._last
            self.tokens += int(row.get("tokens", 0))
            self.taken += 1
        self._last = now
        self.rows.append({k: v for k, v in row.items() if k not in ("tokens", "resumed")})
        if now - self._told >= SIGN:
            self._told = now
            report({"step": row["step"], "steps": self.steps})

    def thinned(self) -> list[dict[str, Any]]:
        """Looks as they are, and at most POINTS means of equal stretches of the training loss."""
        looks = [row for row in self.rows if "loss" not in row and len(row) > 1]
        losses = [row for row in self.rows if "loss" in row]
        stride = max(1, -(-len(losses) // POINTS))
        means = []
        for i in range(0, len(losses), stride):
            part = losses[i : i + stride]
            mean = sum(row["loss"] for row in part) / len(part)
            means.append({"step": part[-1]["step"], "loss": mean, "lr": part[-1]["lr"]})
        return sorted([*means, *looks], key=lambda row: row["step"])


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
    from tunewise.machine import PeakMemory, resident, seed_everything

    warm_up(study)
    prepared, base = prepare(study, method)
    encode(prepared, base, ("train", "valid"))
    seed_everything(seed)
    renew(prepared.model)
    place = Path(study) / directory
    settings = _settings(
        study,
        lr=lr,
        steps=max(1, steps),
        warmup_steps=warmup_steps,
        decay_from=decay_from if last else None,
        evaluations=LOOKS if last else 0,
        checkpoint_every=max(1, steps),
        **({} if micro_batch is None else {"micro_batch": micro_batch}),
        **({} if last else {"schedule": "constant"}),
    )
    before, held = resident(), _size(features.values())
    handle = attach(prepared.model, prepared.recipe)
    try:
        task = prepared.data.task
        run = Run(handle, data=prepared.examples, task=task, seed=seed, directory=place, settings=settings)
        run.tokenizer = prepared.tokenizer
        curve = run.listen = Curve(steps)
        with (
            PeakMemory(run.device) as memory,
            shared_features(study, run) as frozen,
        ):
            start = time.perf_counter()
            run.recipe.single("loop").run(run)  # type: ignore[union-attr]
            curve.training = curve.training or time.perf_counter() - start
            run.listen = lambda row: None
            valid = evaluate(run, prepared.examples["valid"])
        grown = _size(features.values()) - held + (before if run.device.type == "cpu" else 0)
        metrics: dict[str, Any] = {
            "score": valid.get(task.metric),
            **{f"valid/{k}": v for k, v in valid.items()},
            "training": curve.training,
            "alone": curve.training + row_seconds * _taken_over(run, frozen),
            "peak_memory_mb": _peak(memory.bytes - grown, handle, base),
            "trainable": handle.trainable,
            "tokens": curve.tokens,
            "micro_batch": min(settings.micro_batch or settings.batch_size, settings.batch_size),
            "warmup_steps": warmup_steps,
            "shared_blocks": frozen.blocks,
        }
        if last:
            metrics |= {"decay_from": decay_from, "size_mb": _keep(prepared, run, seed, place, metrics)}
    finally:
        handle.detach()
    return {"metrics": metrics, "curve": curve.thinned()}


def shared_features(study: str, run: Any) -> Any:
    """A `with` block in which the run takes frozen states of rows that this worker has computed before."""
    from tunewise.loop.features import frozen_features

    return frozen_features(run, features, limit_bytes=read_brief(study)[0]["cache_bytes"])


def _taken_over(run: Any, frozen: Any) -> int:
    """Rows whose states were there already, which `tune` would have computed."""
    rows = sum(len(part) for part in run.streams.data.values())
    return max(0, min(rows, frozen.served) - frozen.computed) if frozen.blocks else 0


def _size(tensors: Iterable[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def _peak(taken: int, handle: Any, base: Base) -> float:
    """MiB that a process takes which does this alone: without what the worker keeps for others, and without the
    originals of trained base weights, which are only there to be put back.
    """
    originals = _size(e.original for e in handle.existing.values())
    return (taken - originals + weights_of(base) + _libraries["bytes"]) / MIB


def weights_of(base: Base) -> int:
    """Bytes of the base model."""
    return _size([*base.model.parameters(), *base.model.buffers()])


def _keep(prepared: Any, run: Any, seed: int, place: Path, metrics: dict[str, Any]) -> float:
    """A run's folder as `tune` leaves it, ready for predict, merge and export; MiB of its adaptation."""
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
    size = folder_size(run.handle.save(place / "adaptation", extra=extra)) / MIB
    record.facts |= {
        "identity": identity,
        "data": {"name": prepared.data.name, "notes": []},
        "environment": environment(run.device),
    }
    record.finish(metrics={**metrics, "size_mb": size}, recipe_name=prepared.recipe.name)
    return size


@contextmanager
def finished(study: str, method: str, seed: int, directory: str) -> Iterator[tuple[Any, Any, Base]]:
    """(run, prepared, base) of a finished trial, its adaptation on the worker's base model for the time of it."""
    from tunewise.core.handle import restore
    from tunewise.core.run import Run

    prepared, base = prepare(study, method)
    encode(prepared, base, ("train", "valid", "test"))
    handle = restore(prepared.model, Path(study) / directory / "adaptation")
    try:
        prepared.recipe = handle.recipe
        run = Run(handle, task=prepared.data.task, seed=seed, settings=_settings(study))
        run.tokenizer = prepared.tokenizer
        yield run, prepared, base
    finally:
        handle.detach()
