"""`tune`: one method on one model and one data set, from what the user names to a finished run folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from tunewise.afterwards import Result, evaluate, export_run, merge_run, predict
from tunewise.core.errors import UserError
from tunewise.prepare import Prepared, RowArgs, complete, default_sizes, encode, load_base, prepare_data
from tunewise.progress import Progress
from tunewise.record import Record, folder_size

if TYPE_CHECKING:
    from tunewise.core.handle import Handle
    from tunewise.core.recipe import Recipe
    from tunewise.core.run import Run
    from tunewise.loop.settings import Settings

__all__ = ["Result", "evaluate", "export_run", "merge_run", "predict", "tune"]

Say = Callable[[str], None]
DEFAULT_RATE = 1e-4
FEATURES = 2**30
"""Bytes for the states of rows below everything that a method changes: they are computed once."""


def tune(
    model: Any,
    data: Any,
    *,
    method: Any = "lora",
    lr: float | None = None,
    batch_size: int | None = None,
    epochs: float | None = None,
    steps: int | None = None,
    dtype: str | None = None,
    device: str = "auto",
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    dry_run: bool = False,
    checkpoint_every: int | None = None,
    options: dict[str, Any] | None = None,
    tokenizer: Any = None,
    say: Say | None = None,
    progress: bool = False,
    final_test: bool = True,
    **rows: Unpack[RowArgs],
) -> Result:
    """Fine-tunes `model` on `data` by `method`; gives metrics, predictions, the model and its handle.

    model   a folder, demo name, hub id, a module (with `tokenizer=`), or (module, tokenizer)
    data    a file, folder, demo name, `datasets` id, Dataset, DataFrame or list of dicts
    rows    where rows and answers are: task, train, valid, test, text_column, label_column, metric, ... (`RowArgs`)
    out     folder of the run; without it nothing is written. `options` are further settings of the loop.
    final_test=False leaves the test rows alone: for choosing settings by validation rows
    Test rows are only touched by the last evaluation. Raises `UserError` for bad input before anything is
    trained, and `RunError` when a run cannot go on (a loss that became NaN).
    """
    from tunewise.loop.settings import Settings
    from tunewise.machine import pick_device, seed_everything

    say = say or (lambda sentence: None)
    if isinstance(model, tuple):
        model, tokenizer = model
    if resume and out is None:
        raise UserError("--resume needs --out: the folder of the run that is to go on.")
    target = pick_device(device)
    recipe = complete(method, None, None)
    record = Record(Path(out)) if out is not None and not dry_run else None
    if record is not None:
        record.writable()
    given = {
        "lr": lr if lr is not None else _default_rate(recipe),
        "batch_size": batch_size,
        "epochs": epochs,
        "steps": steps,
        "dtype": dtype,
        "checkpoint_every": checkpoint_every,
    }
    given = {k: v for k, v in given.items() if v is not None} | (options or {})
    Settings.of(**given)
    read = prepare_data(data, say=say, **rows)
    seed_everything(seed)
    prepared = load_base(
        model, tokenizer, method, read, target, say, meta=dry_run and not hasattr(model, "parameters")
    )
    settings = Settings.of(**{**default_sizes(read.task.name, target.type), **given})
    if dry_run:
        return _dry(prepared, settings)
    return _execute(prepared, settings, seed, record, resume, say, progress, final_test)


def _default_rate(recipe: Recipe) -> float:
    """The middle of the method's own prior; the highest one would be reckless, the lowest slow."""
    prior = recipe.lr
    return prior[len(prior) // 2] if prior else DEFAULT_RATE


def _attach(prepared: Prepared, undo: bool) -> Handle:
    from tunewise.core.handle import attach

    return attach(prepared.model, prepared.recipe, undo=undo)


def _dry(prepared: Prepared, settings: Settings) -> Result:
    from tunewise.plan import plan_of

    handle = _attach(prepared, False)
    data = prepared.data
    steps = settings.steps or max(
        1, round(settings.epochs * -(-len(data.splits.train) // settings.batch_size))
    )
    facts = {
        "model": prepared.base["name"],
        "data": data.name,
        "task": data.task.name,
        "lr": settings.lr,
        "steps": steps,
    }
    facts |= {f"{name} rows": len(part) for name, part in data.splits.items()}
    return Result(plan={**plan_of(handle.recipe, handle), **facts})


def _identity(prepared: Prepared, settings: Settings, seed: int) -> dict[str, Any]:
    from dataclasses import asdict

    said = asdict(settings)  # type: ignore[call-overload]
    kept = {k: v for k, v in said.items() if k not in ("checkpoint_every", "features")}
    return {
        "model": prepared.base,
        "data": prepared.data.sha256,
        "method": prepared.recipe.describe(),
        "seed": seed,
        "task": prepared.data.task.describe(),
        "settings": kept,
    }


def _execute(
    prepared: Prepared,
    settings: Settings,
    seed: int,
    record: Record | None,
    resume: bool,
    say: Say,
    progress: bool,
    final_test: bool,
) -> Result:
    from tunewise.core.run import Run
    from tunewise.loop.feature_folder import FeatureFolder
    from tunewise.loop.features import frozen_features
    from tunewise.machine import PeakMemory, environment

    device = next(prepared.model.parameters()).device
    out = record.directory if record is not None else None
    identity = _identity(prepared, settings, seed)
    if record is not None:
        facts = {
            "data": {"name": prepared.data.name, "notes": prepared.data.notes},
            "environment": environment(device),
        }
        if record.begin(identity, facts, resume) == "done":
            say(f"{out} is finished already; these are its results.")
            return Result.open(record.directory, prepared)
    encode(prepared, ("train", "valid"), say)
    handle = _attach(prepared, undo=prepared.own_model)
    if record is not None:
        record.room(16 * handle.trainable * 4 + 2**20)
    run = Run(
        handle, data=prepared.examples, task=prepared.data.task, seed=seed, directory=out, settings=settings
    )
    run.tokenizer = prepared.tokenizer
    say(f"{handle.recipe.name}: {handle.trainable:,} trainable numbers, learning rate {settings.lr:g}.")
    with Progress(progress, handle.recipe.name) as bar, PeakMemory(device) as memory:
        run.listen = _listener(record, bar, run)
        started = time.perf_counter()
        store = FeatureFolder(settings.features) if settings.features else {}
        limit = store.room if isinstance(store, FeatureFolder) else FEATURES
        with frozen_features(run, store, limit_bytes=limit, order=seed):
            handle.recipe.single("loop").run(run)  # type: ignore[union-attr]
        seconds = time.perf_counter() - started
        run.listen = lambda row: None
        metrics = _measure(prepared, run)
        result = Result(metrics=metrics, prepared=prepared, handle=handle, directory=out, run=run)
        if final_test:
            result.measure_test(say, bar.stage)
    metrics |= {
        "seconds": seconds,
        "peak_memory_mb": memory.bytes / 2**20,
        "trainable": handle.trainable,
        "steps": run.step,
    }
    if record is not None:
        _keep(record, result, identity)
    return result


def _listener(record: Record | None, bar: Progress, run: Run) -> Callable[[dict[str, Any]], None]:
    def listen(row: dict[str, Any]) -> None:
        if record is not None:
            record.write_row(row)
        bar.row(row, run)

    return listen


def _measure(prepared: Prepared, run: Run) -> dict[str, float]:
    """Validation metrics of the state that was kept, with a prefix."""
    from tunewise.loop.evaluate import evaluate as measure

    if "valid" not in prepared.examples:
        return {}
    return {f"valid/{k}": v for k, v in measure(run, prepared.examples["valid"]).items()}


def _keep(record: Record, result: Result, identity: dict[str, Any]) -> None:
    from tunewise.study.report.run_report import run_report

    assert result.handle is not None
    folder = result.handle.save(
        record.directory / "adaptation", extra={"task": identity["task"], "base": identity["model"]}
    )
    result.metrics["size_mb"] = folder_size(folder) / 2**20
    record.finish(metrics=result.metrics, recipe_name=result.handle.recipe.name)
    run_report(record.directory)
