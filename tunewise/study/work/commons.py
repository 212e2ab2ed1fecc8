"""What all trials of a study share: rows, task, sizes, and in each worker the base model and encoded rows."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunewise.core.checkpoint import write_json, write_text
from tunewise.core.part import describe_part
from tunewise.data.image import Picture
from tunewise.data.splits import Splits
from tunewise.prepare import Data, Prepared, carry, load_base
from tunewise.study.work.worker_main import shared
from tunewise.task import Task

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "Base",
    "Objects",
    "encode",
    "objects",
    "open_base",
    "prepare",
    "read_brief",
    "task_of",
    "write_brief",
]

SETS = ("train", "valid", "test")


@dataclass
class Objects:
    """What the user gave as objects and no other process can have: model, tokenizer, task, methods by name."""

    model: Any = None
    tokenizer: Any = None
    task: Task | None = None
    methods: dict[str, Any] = field(default_factory=dict)

    @property
    def any(self) -> bool:
        """Whether there is anything: then trials run in the user's own process."""
        return self.model is not None or self.task is not None or bool(self.methods)


@dataclass
class Base:
    """A loaded base model with what was computed on it once: encoded rows and notes such as references."""

    model: nn.Module
    tokenizer: Any
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


features: dict[Any, Any] = {}
"""States of rows below what a trial changes, for all trials of this worker; their keys say of which weights."""

objects: dict[str, Objects] = {}
"""Objects by the study's folder, in the process of the user alone."""


def write_brief(folder: Path, data: Data, **facts: Any) -> None:
    """`data/*.jsonl` and `brief.json`: what a worker needs to know of the study, in plain text."""
    for name in SETS:
        lines = [json.dumps(row, default=_plain) for row in data.splits[name]]
        write_text(folder / "data" / f"{name}.jsonl", "".join(f"{line}\n" for line in lines))
    read_brief.cache_clear()
    known = {"data": data.name, "sha256": data.sha256, "task": data.task.describe()}
    write_json(folder / "brief.json", {**known, **facts})


def _plain(value: Any) -> Any:
    """Numbers and lists of numpy as Python's own, images whole, everything else (dates) as it reads."""
    if isinstance(value, Picture):
        return value.plain()
    return value.tolist() if hasattr(value, "tolist") else str(value)


@lru_cache(maxsize=1)
def read_brief(folder: str) -> tuple[dict[str, Any], Splits]:
    """(facts, rows in three sets) as `write_brief` wrote them."""
    place = Path(folder)
    facts = json.loads((place / "brief.json").read_text(encoding="utf-8"))
    rows: dict[str, list[dict[str, Any]]] = {}
    for name in SETS:
        with (place / "data" / f"{name}.jsonl").open(encoding="utf-8") as lines:
            rows[name] = [json.loads(line, object_hook=Picture.from_plain) for line in lines]
    return facts, Splits(rows["train"], rows["valid"], rows["test"])


def task_of(folder: str, facts: Mapping[str, Any]) -> Task:
    """The task of the study, new for every trial: a head may change where it pads."""
    held = objects.get(folder)
    return copy.deepcopy(held.task) if held and held.task else Task.from_description(facts["task"])


def open_base(folder: str, auto: str) -> Base:
    """The base model loaded for `auto`, once per worker."""
    from tunewise.backbone import load
    from tunewise.machine import pick_device

    facts, _ = read_brief(folder)
    held = objects.get(folder)
    if held is not None and held.model is not None:
        return shared((folder, "own"), lambda: Base(held.model, held.tokenizer))
    task = task_of(folder, facts)
    classes = "classification" in auto
    options = {
        "labels": list(getattr(task, "labels", None) or []) if classes else None,
        "regression": task.name == "regression" and classes,
        "device": pick_device(facts["device"]),
    }
    return shared((folder, auto), lambda: Base(*load(facts["model"], auto=auto, **options)))


def prepare(folder: str, method: str) -> tuple[Prepared, Base]:
    """The method's recipe on the worker's base model, which has to be given back as it was: `own_model`."""
    from tunewise.machine import pick_device

    facts, splits = read_brief(folder)
    held = objects.get(folder) or Objects()
    data = Data(task_of(folder, facts), splits, facts["data"], facts["sha256"])
    taken: list[Base] = []

    def load(name: Any, *, auto: str, **_: Any) -> tuple[nn.Module, Any]:
        taken.append(open_base(folder, auto))
        return taken[0].model, taken[0].tokenizer

    model = held.model if held.model is not None else facts["model"]
    recipe = held.methods.get(method, method)
    device = pick_device(facts["device"])
    made = load_base(model, held.tokenizer, recipe, data, device, lambda note: None, load=load)
    made.own_model = True
    return made, taken[0] if taken else open_base(folder, "own")


def encode(prepared: Prepared, base: Base, names: Iterable[str]) -> list[str]:
    """Token ids of the named sets, made once for all trials that read rows the same way; notes on cut rows."""
    task, notes = prepared.data.task, []
    head: Any = prepared.recipe.single("head")
    if prepared.tokenizer is not None:
        task.limit(prepared.tokenizer)
    for name in names:
        rows = prepared.data.splits[name]
        key = json.dumps([name, describe_part(head), task.describe()], sort_keys=True, default=str)
        if rows and key not in base.examples:
            base.examples[key] = task.encode(rows, prepared.tokenizer, head)
            notes += task.notes
            task.notes.clear()
        if rows:
            prepared.examples[name] = base.examples[key]
            if name == "train":
                carry(prepared.recipe, rows, base.examples[key])
    return list(dict.fromkeys(notes))


def settings_of(study: str, **own: Any) -> Any:
    from tunewise.loop.settings import Settings

    return Settings.of(**{**read_brief(study)[0]["settings"], **own})


def smaller(study: str, micro_batch: int | None) -> dict[str, int]:
    """Fewer rows per forward pass, in evaluations too: those without gradients may be twice as many."""
    if micro_batch is None:
        return {}
    usual = settings_of(study).eval_batch_size
    return {"micro_batch": micro_batch, "eval_batch_size": min(usual, 2 * micro_batch)}
