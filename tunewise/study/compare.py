"""`compare`: many methods on one model and one data set, within a budget, on the same footing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from tunewise.backbone import fetch
from tunewise.core.checkpoint import write_text
from tunewise.core.errors import RunError, UserError
from tunewise.core.method import read_recipe
from tunewise.core.recipe import Recipe
from tunewise.prepare import Data, RowArgs, default_sizes, prepare_data
from tunewise.study.budget import Clock, parse_memory, parse_time
from tunewise.study.conduct import Conductor
from tunewise.study.facts import write_facts
from tunewise.study.halving import Plan
from tunewise.study.judge.prefer import parse_prefer
from tunewise.study.planning import conductor_of, halving_plan
from tunewise.study.portfolio import BASELINES, fits, prior, read_methods
from tunewise.study.replay import Trial
from tunewise.study.schedule import MEASURE, fixed_list
from tunewise.study.setup import Setup, find_machine
from tunewise.study.store import Store
from tunewise.study.study import Study, conclude
from tunewise.study.work.commons import Objects, objects, write_brief

__all__ = ["compare"]

Say = Callable[[str], None]
CACHE = 2**30  # bytes of frozen features that a worker keeps, at most
PLANNED = (
    *("lr", "steps", "epochs", "schedule", "warmup", "warmup_steps", "decay_from"),
    *("evaluations", "checkpoint_every", "patience", "valid_rows"),
)
SEEDS = 3  # times as many seeds as were asked for, at most, where time is left


def compare(
    model: Any,
    data: Any,
    *,
    methods: Any = "default",
    budget: Any = "10m",
    memory: Any = None,
    seeds: int = 3,
    prefer: str = "quality",
    out: str | Path | None = None,
    general: Any = None,
    batch_size: int | None = None,
    dtype: str | None = None,
    device: str = "auto",
    seed: int = 0,
    options: dict[str, Any] | None = None,
    trials: Sequence[Mapping[str, Any]] | None = None,
    workers: int | None = None,
    dry_run: bool = False,
    tokenizer: Any = None,
    say: Say | None = None,
    progress: bool = False,
    **rows: Unpack[RowArgs],
) -> Study:
    """Tunes every method's learning rate fairly, measures the best on the test rows, and chooses among them.

    methods   "default" (about ten), "all", "a, b, lora(rank=4)", or a list of names, recipes and methods
    budget    time for everything, "30m"; memory for everything at any moment, "4GB"
    seeds     of the finalists; `prefer` chooses on the Pareto front: "quality", "quality within 1%, then memory"
    out       folder of the study; the same call again goes on where it stopped. Default: a new temporary folder
    general   data whose text shows what is forgotten; default: news sentences
    trials    dicts (method, lr, seed, steps) to run instead of tuning; workers: processes side by side
    dry_run   plans, says what each method would get, and stops
    rows      where rows and answers are: task, train, valid, test, text_column, label_column, metric, ... (`RowArgs`)
    The other arguments are those of `tune`. Gives a `Study` with .table .front .best .decision .report.
    Raises `UserError` for bad input, and where the budget is too small for the methods before anything is tuned.
    """
    say = say or (lambda sentence: None)
    clock = Clock(parse_time(budget))
    if isinstance(model, tuple):
        model, tokenizer = model
    parse_prefer(prefer)
    if seeds < 1:
        raise UserError(f"seeds={seeds} is not valid: at least 1.")
    if tokenizer is not None and isinstance(model, str | Path):
        raise UserError(
            "tokenizer= belongs to a model that is given as an object; a named one brings its own."
        )
    for name in PLANNED:
        if name in (options or {}):
            raise UserError(f"{name} is what a comparison decides by itself: leave it out.")
    if isinstance(model, str | Path):
        fetch(model, say)
    machine = find_machine(device, None if memory is None else parse_memory(memory), workers)
    read = prepare_data(data, say=say, **rows)
    if not read.splits.valid:
        raise UserError("A comparison chooses by validation rows, and there are none: give --valid.")
    given = {k: v for k, v in (("batch_size", batch_size), ("dtype", dtype)) if v is not None}
    if getattr(read.task, "generation_metric", None):
        read.task.references(read.splits.valid[:1])  # type: ignore[attr-defined]
    settings = {**default_sizes(read.task.name, machine.device.type), **given, **(options or {})}
    names, own, trials = _methods(methods, read.task.name, trials)
    held = _objects(model, tokenizer, read, rows, own)
    identity = {
        "model": str(model) if held.model is None else type(model).__name__,
        "data": read.sha256,
        "task": read.task.describe(),
        "methods": names,
        "budget": clock.budget,
        "memory": machine.memory,
        "seeds": seeds,
        "seed": seed,
        "settings": settings,
        "trials": trials,
        "device": machine.device.type,
        "own": {name: read_recipe(item).describe() for name, item in own.items()},
    }
    with Store.open(_folder(out, say), identity) as store:
        clock.before = float(store.get("spent", 0.0))
        objects[str(store.folder)] = held
        write_brief(
            store.folder,
            read,
            model=str(model) if held.model is None else None,
            settings=settings,
            seed=seed,
            device=str(machine.device),
            general=_general(general, store.folder),
            cache_bytes=min(CACHE, machine.limit // 4) if machine.limit else CACHE,
        )
        asked = {**rows, "device": None if device == "auto" else device}
        known = (model if held.model is None else None, data)
        write_facts(store, identity, read, prefer, machine, known, asked, general)
        with Setup(store, machine, clock, names, settings, say, held.any) as setup:
            planned = halving_plan(setup, read, clock, seeds, seed) if trials is None else fixed_list(trials)
            setup.waiting(BASELINES.get(read.task.name, ()))
            say(planned.describe())
            store.set("plan", planned.describe().split("\n"))
            if dry_run:
                return Study(store.folder)
            return _carry_out(conductor_of(setup, planned, clock, read), setup, say, progress)


def _methods(given: Any, task: str, trials: Any) -> tuple[list[str], dict[str, Any], Any]:
    """(names, methods by name that were given as objects, trials with names alone)."""
    own: dict[str, Any] = {}

    def name_of(item: Any) -> Any:
        if isinstance(item, str):
            return item
        same = [name for name, known in own.items() if known is item]
        recipe = read_recipe(item)
        if not fits(recipe, task):
            raise UserError(
                f"{recipe.name} reads another kind of answer than the task {task} has; leave it out."
            )
        name = recipe.name or "recipe"
        taken = [known for known in own if known.partition("-")[0] == name]
        name = f"{name}-{len(taken) + 1}" if taken and not same else name
        own[name] = own.get(name, item)
        return same[0] if same else name

    if trials is not None:
        named = [{**t, "method": name_of(t.get("method"))} if isinstance(t, Mapping) else t for t in trials]
        fixed = fixed_list(named)
        for trial in fixed.trials:
            _check_trial(trial, read_recipe(own.get(trial.method, trial.method)))
        return list(dict.fromkeys(trial.method for trial in fixed.trials)), own, named
    items = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    names = [name_of(item) for item in items]
    texts = [name for name in names if name not in own]
    return list(dict.fromkeys([*own, *read_methods(texts, task)])), own, None


def _check_trial(trial: Trial, recipe: Recipe) -> None:
    """What is solved takes neither steps nor a rate; everything else takes both."""
    rates = prior(recipe)
    if rates and (trial.lr is None or not trial.steps):
        raise UserError(
            f"A trial of {trial.method} needs lr and steps, for example lr={rates[len(rates) // 2]:g}."
        )
    if not rates and (trial.lr is not None or trial.steps):
        raise UserError(f"{trial.method} is solved in one go: its trial takes neither lr nor steps.")


def _general(given: Any, folder: Path) -> str | None:
    """The file of the user's general text: read now, so that a wrong name is not found out at the end."""
    if given is None:
        return None
    from tunewise.data import read_rows
    from tunewise.diagnose.forgetting import general_texts

    rows = read_rows(given).rows
    lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows]
    write_text(folder / "data" / "general.jsonl", "".join(lines))
    general_texts(str(folder / "data" / "general.jsonl"))
    return str(folder / "data" / "general.jsonl")


def _folder(out: str | Path | None, say: Say) -> Path:
    if out is not None:
        return Path(out)
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="tunewise-study-"))
    say(f"The study is kept in {folder}.")
    return folder


def _objects(model: Any, tokenizer: Any, read: Data, rows: RowArgs, own: dict[str, Any]) -> Objects:
    """What cannot be sent to a worker process."""
    import torch

    is_object = isinstance(model, torch.nn.Module)
    if is_object and tokenizer is None:
        raise UserError(
            "A model given as an object needs its tokenizer: compare((model, tokenizer), ...) or tokenizer=."
        )
    mine = callable(rows.get("metric")) or not isinstance(rows.get("task"), str | None)
    return Objects(model if is_object else None, tokenizer, read.task if mine else None, own)


def _carry_out(conductor: Conductor, setup: Setup, say: Say, progress: bool) -> Study:
    from tunewise.study.live import Live

    store = setup.store
    with Live(store, conductor, progress) as live:
        conductor.watch = live.watch
        try:
            begun = conductor.clock.spent
            store.set("stages", {**store.get("stages", {}), "setup": store.get("setup_seconds", begun)})
            conductor.tune()
            tuned = conductor.clock.spent
            conductor.measure(setup.waiting(BASELINES.get(store.get("facts")["task"], ())))
            if (
                isinstance(conductor.schedule, Plan)
                and conductor.schedule.length < conductor.schedule.most_steps
            ):
                conductor.more_seeds(SEEDS * conductor.schedule.seeds)
            spent = conductor.clock.spent
            if not conductor.begun:
                return conclude(store)
            stages = store.get("stages")
            for name, seconds in (("tuning", tuned - begun), ("measuring", spent - tuned)):
                stages[name] = stages.get(name, 0.0) + seconds
            store.set("stages", stages)
            store.set("spent", spent)
            conductor.tidy()
        except KeyboardInterrupt:
            setup.pool.close()
            for row in store.trials("running"):
                store.requeue(row.id, "stopped by hand")
            store.set("spent", conductor.clock.spent)
            study = conclude(store)
            for sentence in study.decision:
                say(sentence)
            raise KeyboardInterrupt(str(study.report)) from None
    study = conclude(store)
    if not any(t.status == "done" and t.rung != MEASURE for t in store.trials()):
        reasons = list(dict.fromkeys(str(t.reason) for t in store.trials("failed")))
        raise RunError(f"No trial of the study ended well: {'; '.join(reasons[:3])}.")
    return study
