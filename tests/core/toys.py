"""A toy task, toy runs and toy parts, written as a third party would: what the tests of the core share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from tests.models import tiny
from tunewise.core.handle import attach
from tunewise.core.method import read_recipe
from tunewise.core.part import Part
from tunewise.core.recipe import Recipe
from tunewise.core.run import Run
from tunewise.loop.settings import Settings
from tunewise.loop.single import Single
from tunewise.objective.task_loss import TaskLoss
from tunewise.optim.adamw import AdamW

__all__ = [
    "FeatureBank",
    "HalveRanks",
    "Recorder",
    "Rounds",
    "Stopped",
    "ToyTask",
    "complete",
    "interrupted",
    "rows",
    "run_of",
    "same_state",
    "start",
    "stop_at",
]


class Stopped(Exception):
    """The process was killed here."""


@dataclass
class ToyBatch:
    """What a task's `collate` gives."""

    inputs: dict[str, Tensor]
    labels: Tensor | None
    ids: list[str]
    units: Tensor

    def to(self, device: torch.device) -> ToyBatch:
        return self


class ToyTask:
    """Two classes: is the first token a high one? Rows are as long as each other."""

    name, metric, higher_is_better = "classification", "accuracy", True

    def collate(self, examples: Sequence[dict[str, Any]], tokenizer: Any) -> ToyBatch:
        ids = torch.tensor([e["input_ids"] for e in examples])
        labels = torch.tensor([e["labels"] for e in examples])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return ToyBatch(inputs, labels, [e["id"] for e in examples], torch.ones(len(examples)))

    def losses(self, logits: Tensor, batch: ToyBatch) -> Tensor:
        assert batch.labels is not None
        return F.cross_entropy(logits.float(), batch.labels, reduction="none")

    def predict(self, logits: Tensor, batch: ToyBatch) -> list[int]:
        return logits.argmax(-1).tolist()  # type: ignore[no-any-return]

    def metrics(self, predictions: Sequence[int], examples: Sequence[dict[str, Any]]) -> dict[str, float]:
        right = [p == e["labels"] for p, e in zip(predictions, examples, strict=True)]
        return {"accuracy": sum(right) / len(right)}


def rows(count: int, name: str = "train") -> list[dict[str, Any]]:
    """Encoded examples, the same for the same name."""
    make = torch.Generator().manual_seed(len(name))
    ids = torch.randint(3, 99, (count, 6), generator=make).tolist()
    return [
        {"id": f"{name}-{i}", "input_ids": t, "labels": int(t[0] > 50), "length": 6}
        for i, t in enumerate(ids)
    ]


def complete(method: Any, **defaults: Any) -> Recipe:
    """The recipe with loss, optimizer and loop."""
    slots = {"objective": TaskLoss(), "optimizer": AdamW(), "loop": Single(), **defaults}
    return read_recipe(method).with_defaults(**slots)


def run_of(
    method: Any,
    directory: Path | None = None,
    *,
    dropout: bool = True,
    data: dict[str, Any] | None = None,
    undo: bool = True,
    **settings: Any,
) -> Run:
    """Everything fresh, as in a new process: model, handle and run; 6 steps of 8 rows unless told otherwise."""
    torch.manual_seed(0)
    model: nn.Module = tiny("bert")
    for module in model.modules():
        if isinstance(module, nn.Dropout) and not dropout:
            module.p = 0.0
    handle = attach(model, complete(method), seed=1, undo=undo)
    options = {"lr": 1e-2, "batch_size": 8, "steps": 6, "evaluations": 0, **settings}
    data = data or {"train": rows(24), "valid": rows(8, "valid")}
    return Run(
        handle, data=data, task=ToyTask(), seed=3, directory=directory, settings=Settings.of(**options)
    )


def start(run: Run) -> Run:
    """Executes the run's loop."""
    run.recipe.single("loop").run(run)  # type: ignore[union-attr]
    return run


def stop_at(run: Run, step: int, child: str | None = None) -> Run:
    """The run ends by an exception right after this step, before any checkpoint of it is written."""

    def listen(row: dict[str, Any]) -> None:
        if "loss" in row and row["step"] == step and row.get("child") == child:
            raise Stopped

    run.listen = listen
    return run


def interrupted(make: Callable[[], Run], step: int, child: str | None = None) -> Run:
    """A run that was stopped at `step` and went on with everything fresh."""
    try:
        start(stop_at(make(), step, child))
    except Stopped:
        return start(make())
    raise AssertionError(f"the run never came to step {step}")


def same_state(a: Run, b: Run) -> bool:
    """Whether two runs learnt bit-equal tensors."""
    x, y = a.handle.state(), b.handle.state()
    return x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x)


class Recorder(Part):
    """Notes every event of the run; subclasses fill a slot and a gradient stage."""

    def note(self, run: Run, event: str) -> None:
        run.extra.setdefault("calls", []).append(f"{run.step} {event} {type(self).__name__}")

    def prepare(self, run: Run) -> None:
        self.note(run, "prepare")

    def select(self, run: Run, ids: list[str]) -> list[str]:
        self.note(run, "select")
        return ids

    def before_step(self, run: Run) -> None:
        self.note(run, "before_step")

    def gradients(self, run: Run) -> None:
        self.note(run, "gradients")

    def after_step(self, run: Run) -> None:
        self.note(run, "after_step")

    def boundary(self, run: Run, kind: str) -> None:
        self.note(run, f"boundary:{kind}")

    def finish(self, run: Run) -> None:
        self.note(run, "finish")


class HalveRanks(Part):
    """At step `at`, the half of each site's rank-1 parts with the larger smoothed |B_i| |A_i| is kept."""

    slot: ClassVar[str] = "allocate"
    needs: ClassVar[frozenset[str]] = frozenset({"sizes", "components"})
    at: PositiveInt = 4
    smooth: float = 0.5

    def after_step(self, run: Run) -> None:
        for where, rank in run.tensors.sizes().items():
            a, b = (run.tensors.info(f"{where}.{n}").tensor.detach() for n in ("A", "B"))
            now = a.norm(dim=1) * b.norm(dim=0)
            seen = self.state.get(where, now)
            self.state[where] = self.smooth * seen + (1 - self.smooth) * now if len(seen) == rank else now
            if run.step == self.at:
                keep = self.state[where].topk(rank // 2).indices.sort().values
                run.tensors.resize(where, rank // 2, keep=keep)


class FeatureBank(Part):
    """bank[id] = the loss that the row had when it was last seen."""

    slot: ClassVar[str] = "diagnose"
    capacity: PositiveInt = 10

    def after_step(self, run: Run) -> None:
        run.store("bank", self.capacity).update(run.sample_losses)


class Rounds(Part):
    """`count` child runs one after another, each from the artefacts of the one before."""

    slot: ClassVar[str] = "loop"
    count: PositiveInt = 2

    def run(self, run: Run) -> None:
        inner = Recipe(**{**run.recipe.essential, **run.recipe.default, "loop": Single()})
        artefacts: dict[str, Any] = {}
        for i in range(self.count):
            artefacts = run.child(f"round_{i + 1}", inner, start=artefacts)
            run.fire("boundary", "round")
        run.handle.load_state(artefacts["adaptation"])
        run.fire("finish")
