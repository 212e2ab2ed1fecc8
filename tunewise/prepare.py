"""From what a user names (model, data, method) to what a run needs: recipe, task, rows, loaded model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict

from tunewise.core.compat import check
from tunewise.core.errors import UserError, did_you_mean
from tunewise.core.method import read_recipe
from tunewise.core.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn

    from tunewise.data import Splits
    from tunewise.task import Task

__all__ = ["Data", "Prepared", "RowArgs", "carry", "complete", "default_sizes", "encode", "load_base"]
__all__ += ["prepare_data"]

Say = Callable[[str], None]


class RowArgs(TypedDict, total=False):
    """What `tune`, `estimate` and `compare` take to find rows, as `prepare_data` reads it.

    task        "classification", "image_classification", "regression", "causal" or a Task; detected if not given
    train, valid, test   rows of these sets, in whatever form DATA may have
    text_column, label_column   names; "a,b" for pairs of texts
    metric      a name of the task's, or a function (predictions, references) -> float
    max_length  tokens per row; image_size pixels along an edge; skip_bad_rows leaves out unreadable rows, counted
    """

    task: Any
    train: Any
    valid: Any
    test: Any
    text_column: Any
    label_column: str | None
    metric: Any
    max_length: int | None
    image_size: int | None
    skip_bad_rows: bool


@dataclass
class Data:
    """Rows in three sets, the task they stand for, and where they came from."""

    task: Task
    splits: Splits
    name: str
    sha256: str
    notes: list[str] = field(default_factory=list)


@dataclass
class Prepared:
    """A loaded base model with the task's examples; `base` is what run.json says about the model."""

    model: nn.Module
    tokenizer: Any
    recipe: Recipe
    data: Data
    base: dict[str, Any]
    own_model: bool = False
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def prepare_data(
    data: Any,
    *,
    task: Any = None,
    train: Any = None,
    valid: Any = None,
    test: Any = None,
    text_column: Any = None,
    label_column: str | None = None,
    metric: Any = None,
    max_length: int | None = None,
    image_size: int | None = None,
    skip_bad_rows: bool = False,
    say: Say,
) -> Data:
    """Reads, detects, splits and fits the task; everything that was decided is said."""
    from tunewise.data import detect_columns, read_rows, split_rows, usable_rows
    from tunewise.task import Task as TaskClass
    from tunewise.task import make_task

    given = {"train": train, "valid": valid, "test": test}
    given = {k: v for k, v in given.items() if v is not None}
    if given and "train" not in given:
        if data is None:
            raise UserError("Rows to train on are missing: give DATA or --train.")
        given = {"train": data, **given}
    rows = read_rows(given or data, skip_bad_rows=skip_bad_rows)
    if isinstance(task, TaskClass):
        columns, made = task.columns, task
    else:
        columns = detect_columns(rows, task=task, text_column=text_column, label_column=label_column)
        sizes = {} if image_size is None else {"image_size": image_size}
        made = make_task(columns.task, columns, max_length=max_length, metric=metric, **sizes)
    rows = usable_rows(rows, columns, skip_bad_rows=skip_bad_rows)
    splits = split_rows(rows, columns)
    made.fit(splits.train)
    notes = list(dict.fromkeys([*rows.notes, *columns.notes, *splits.notes]))
    for note in notes:
        say(note)
    return Data(made, splits, rows.name, rows.sha256, notes)


def complete(method: Any, task: Task | None, config: Any) -> Recipe:
    """The recipe with the slots filled that every run needs, checked before anything is loaded."""
    from tunewise.loop.single import Single
    from tunewise.objective.task_loss import TaskLoss
    from tunewise.optim.adamw import AdamW

    recipe = read_recipe(method)
    head = task.default_head(config) if task is not None else None
    recipe = recipe.with_defaults(head=head, objective=TaskLoss(), optimizer=AdamW(), loop=Single())
    check(recipe)
    return recipe.fresh()


def load_base(
    model: Any,
    tokenizer: Any,
    method: Any,
    data: Data,
    device: Any,
    say: Say,
    *,
    meta: bool = False,
    load: Callable[..., tuple[nn.Module, Any]] | None = None,
) -> Prepared:
    """Loads the base model as the recipe's head reads it, or takes the user's own module as it is.

    load  stands in for `tunewise.backbone.load`, for example to give out a model that is in memory already
    """
    import torch

    from tunewise.backbone import backbone_config
    from tunewise.backbone import load as load_anew

    load = load or load_anew
    task = data.task
    if isinstance(model, torch.nn.Module):
        if tokenizer is None and task.needs_tokenizer:
            raise UserError(
                "A model given as an object needs its tokenizer: tune((model, tokenizer), ...) or tokenizer=."
            )
        recipe = complete(method, task, getattr(model, "config", None))
        prepared = Prepared(
            model.to(device), tokenizer, recipe, data, {"name": None, "class": type(model).__name__}, True
        )
    else:
        config = backbone_config(model)
        recipe = complete(method, task, config)
        head: Any = recipe.single("head")
        auto = head.auto_for(copy.deepcopy(config))
        labels = list(getattr(task, "labels", None) or []) if "classification" in auto else None
        regression = task.name == "regression" and "classification" in auto
        loaded, tokenizer = load(
            model, auto=auto, labels=labels, regression=regression, device=device, meta=meta, note=say
        )
        base = {"name": str(model), "auto": auto, "labels": labels, "regression": regression}
        prepared = Prepared(loaded, tokenizer, recipe, data, base)
    task.bind(prepared.model.config)  # type: ignore[arg-type]
    taken = sum(getattr(part, "positions", 0) for part in prepared.recipe["delta"])
    if task.position_limit is not None and taken:
        task.position_limit -= taken
    for head in prepared.recipe["head"]:
        head.setup(task, prepared.tokenizer, prepared.model)  # type: ignore[attr-defined]
    return prepared


def encode(prepared: Prepared, names: tuple[str, ...], say: Say) -> None:
    """Token ids of the named sets; truncated rows are counted aloud."""
    task = prepared.data.task
    head: Any = prepared.recipe.single("head")
    for name in names:
        rows = prepared.data.splits[name]
        if rows:
            prepared.examples[name] = task.encode(rows, prepared.tokenizer, head)
            if name == "train":
                carry(prepared.recipe, rows, prepared.examples[name])
    for note in dict.fromkeys(task.notes):
        say(note)
    task.notes.clear()


def carry(recipe: Recipe, rows: Sequence[dict[str, Any]], examples: Sequence[dict[str, Any]]) -> None:
    """Fields of training rows that a part reads (its `row_fields`) go with the encoded rows, as example["row"]."""
    for _, part in recipe.parts():
        for name in getattr(part, "row_fields", ()):
            for row, example in zip(rows, examples, strict=True):
                if name not in row:
                    raise UserError(
                        f"{type(part).__name__} reads the field {name!r}, which row {row['id']} does not have"
                        f"{did_you_mean(name, row)}"
                    )
                example.setdefault("row", {})[name] = row[name]


def default_sizes(task: str, device: str) -> dict[str, int]:
    """Rows per step, per forward pass and per evaluation; long rows on a CPU go through the model in twos, which
    costs no time and saves most memory.
    """
    if task != "causal":
        return {"batch_size": 32}
    return {"batch_size": 8, "eval_batch_size": 8} | (
        {"micro_batch": 2, "eval_batch_size": 4} if device == "cpu" else {}
    )
