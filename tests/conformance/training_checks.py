"""Checks of training on real peptides: loss falls, resume, events, accumulation, losses of weight 0."""

from __future__ import annotations

import inspect
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tunewise.core.errors import UserError
from tunewise.core.handle import attach
from tunewise.core.part import Part
from tunewise.core.recipe import Recipe
from tunewise.core.run import Run
from tunewise.data import Columns
from tunewise.head import ClassHead
from tunewise.loop.settings import Settings
from tunewise.loop.single import Single
from tunewise.objective.task_loss import TaskLoss
from tunewise.optim.adamw import AdamW
from tunewise.task import Classification, ImageClassification
from tunewise.task.image import PIXELS

from .support import IMAGES, Case, fresh, same, tokenizer_of

__all__ = [
    "Spy",
    "check_accumulation",
    "check_lifecycle",
    "check_loop_is_deterministic",
    "check_loss_falls",
    "check_resume",
    "check_zero_weight",
    "in_steps",
    "training_run",
]


@cache
def peptides() -> tuple[Classification, Any, dict[str, list[dict[str, Any]]]]:
    """(task, tokenizer, rows): short real sequences, half of them antimicrobial."""
    from tunewise.assets import demo_rows

    rows = [
        {"id": str(i), **row} for i, row in enumerate(demo_rows("peptides")) if len(row["sequence"]) <= 24
    ]
    by_label = {k: [r for r in rows if r["label"] == k] for k in sorted({r["label"] for r in rows})}
    mixed = [row for pair in zip(*by_label.values(), strict=False) for row in pair][:96]
    task = Classification(Columns(("sequence",), "label", "classification"))
    task.fit(mixed)
    return task, tokenizer_of("roberta"), {"train": mixed[:64], "valid": mixed[64:]}


@cache
def _plain() -> dict[str, list[dict[str, Any]]]:
    task, tokenizer, rows = peptides()
    return {name: task.encode(part, tokenizer) for name, part in rows.items()}


@cache
def _images() -> tuple[ImageClassification, None, dict[str, list[dict[str, Any]]]]:
    """(task, no processor, encoded rows): noise, brighter on the left in one class and on the right in the other."""
    make = torch.Generator().manual_seed(0)
    task = ImageClassification(Columns(("image",), "label", "image_classification"))
    task.labels = ["left", "right"]
    rows: list[dict[str, Any]] = []
    for i in range(96):
        pixels = torch.randn(3, 16, 16, generator=make)
        pixels[:, :, 8 * (i % 2) : 8 * (i % 2) + 8] += 1.0
        rows.append({"id": str(i), PIXELS: pixels, "labels": i % 2, "length": 1})
    return task, None, {"train": rows[:64], "valid": rows[64:]}


def in_steps(case: Case) -> bool:
    """Whether the method trains in optimizer steps of the ordinary loop, and not in a loop of its own."""
    return isinstance(case.parts.single("loop") or Single(), Single)


def whole(recipe: Recipe, eps: float = 1e-8) -> Recipe:
    """The recipe with what a run needs: a classification head, a loss, an optimizer, a loop."""
    recipe = recipe if recipe["head"] else recipe + ClassHead()
    for part in recipe.default.get("optimizer", []):
        if isinstance(part, AdamW):
            part.eps = eps
    return recipe.with_defaults(objective=TaskLoss(), optimizer=AdamW(eps=eps), loop=Single())


def training_run(
    case: Case, *more: Part, folder: Path | None = None, still: bool = False, rows: int = 64, **settings: Any
) -> Run:
    """A run of the method on real rows, ready to be started.

    With `still` the base has no dropout, and an optimizer that does not divide rounding errors by themselves.
    """
    task, tokenizer, texts = _images() if case.base == IMAGES else peptides()
    recipe = case.recipe()
    for part in more:
        recipe = recipe + part
    recipe = whole(recipe, eps=1e-2 if still else 1e-8)
    head: Any = recipe.single("head")
    kind = str(head.auto_for(fresh(case.base, "base").config))  # type: ignore[arg-type]
    model = fresh(case.base, kind)
    for module in model.modules():
        if still and isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    try:
        head.setup(task, tokenizer, model)
        handle = attach(model, recipe, seed=0)
    except UserError as error:
        pytest.skip(str(error))
    own = hasattr(head, "render")  # writes the rows itself
    data = {n: task.encode(part, tokenizer, head) for n, part in texts.items()} if own else _plain()
    data = texts if case.base == IMAGES else data
    data = {"train": data["train"][:rows], "valid": data["valid"]}
    options = {
        "lr": case.lr,
        "batch_size": 8,
        "steps": 4,
        "evaluations": 0,
        "schedule": "constant",
        "warmup": 0.0,
    }
    run = Run(handle, data=data, task=task, directory=folder, settings=Settings.of(**{**options, **settings}))
    run.tokenizer = tokenizer
    torch.manual_seed(0)
    return run


def start(run: Run) -> dict[str, Tensor]:
    """Trains to the end; gives a copy of everything that was trained."""
    run.recipe.single("loop").run(run)  # type: ignore[union-attr]
    return {n: v.clone() for n, v in run.handle.state().items()}


@torch.no_grad()
def loss_now(run: Run) -> float:
    """Mean loss of the training rows, without dropout."""
    run.model.eval()
    batch = run.collate(list(run.streams.data["train"]))
    logits, _ = run.forward(batch)
    return float(run.task.losses(logits, batch).mean())


def check_loss_falls(case: Case) -> None:
    """On real rows the loss falls within 30 steps, by hand or in the method's own loop or optimizer."""
    run = training_run(case, batch_size=16, steps=30, schedule="linear")
    before = loss_now(run)
    if not in_steps(case) or "optimizer" in case.parts.essential:
        start(run)
    else:
        _by_hand(run, case.lr, 30)
    after = loss_now(run)
    assert after < before - 0.02, f"the loss went from {before:.3f} to {after:.3f}"


def _by_hand(run: Run, lr: float, steps: int) -> None:
    """What a user's own loop does with a handle."""
    optimizer = torch.optim.AdamW(run.handle.parameters(), lr=lr)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    run.handle.run = run
    run.handle.watch(optimizer)
    stream = run.batches("train", run.settings.batch_size)
    for _ in range(steps):
        run.model.train()
        run.handle.frozen_eval()
        batch = run.collate(next(stream))
        optimizer.zero_grad()
        run.loss(batch, float(batch.units.sum())).backward()
        torch.nn.utils.clip_grad_norm_(run.handle.parameters(), 1.0)
        optimizer.step()
        decay.step()


class Killed(Exception):
    """Stands for the end of the process."""


def check_resume(case: Case, folder: Path) -> None:
    """Killed after step 3 and started anew from the checkpoint at 2: bit-equal to one never stopped."""
    options = {"steps": 4, "checkpoint_every": 2}
    wanted = start(training_run(case, folder=folder / "whole", **options))
    killed = training_run(case, folder=folder / "parts", **options)

    def listen(row: dict[str, Any]) -> None:
        if row["step"] == 3:
            raise Killed

    killed.listen = listen
    try:
        start(killed)
    except Killed:
        torch.manual_seed(123)
    again = training_run(case, folder=folder / "parts", **options)
    found = start(again)
    assert again.step == 4, f"the resumed run ended at step {again.step} of 4"
    assert list(found) == list(wanted), "the resumed run has other tensors"
    for name, value in found.items():
        same(value, wanted[name], f"{name} after resuming")


class Spy(Part):
    """Writes down every event."""

    slot: ClassVar[str] = "diagnose"
    heard: ClassVar[list[str]] = []

    def prepare(self, run: Run) -> None:
        self.heard.append("prepare")

    def select(self, run: Run, ids: list[str]) -> list[str]:
        self.heard.append("select")
        return ids

    def before_step(self, run: Run) -> None:
        self.heard.append("before_step")

    def gradients(self, run: Run) -> None:
        self.heard.append("gradients")

    def after_step(self, run: Run) -> None:
        self.heard.append("after_step")

    def boundary(self, run: Run, kind: str) -> None:
        self.heard.append(f"boundary {kind}")

    def finish(self, run: Run) -> None:
        self.heard.append("finish")


def check_lifecycle(case: Case, accumulation: int) -> None:
    """Events come in order and once per optimizer step, whatever the number of micro-batches."""
    Spy.heard.clear()
    start(training_run(case, Spy(), rows=8, batch_size=4, steps=3, micro_batch=4 // accumulation))
    step = ["select", "before_step", "gradients", "after_step"]
    wanted = ["prepare", *step, *step, "boundary epoch", *step, "boundary stage", "finish"]
    assert Spy.heard == wanted, f"events were {Spy.heard}"


def check_accumulation(case: Case) -> None:
    """Without dropout, one batch and four micro-batches train to the same numbers.

    Losses that say they are a batch's own, and no sum over its rows, are left out.
    """
    whole_case = Case(case.name, lambda: _without_batchwise(case.recipe()), case.base, case.lr)
    one, four = (start(training_run(whole_case, still=True, steps=2, micro_batch=n)) for n in (8, 2))
    for name, value in one.items():
        error = float((four[name] - value).abs().max()) if value.is_floating_point() else 0.0
        assert error <= 1e-2 * case.lr, f"{name} depends on the accumulation: {error:.1e} after two steps"


class Extra(Part):
    """An extra loss that would leave traces: it draws random numbers and pulls the logits to 0."""

    slot: ClassVar[str] = "objective"
    weight: float = 1.0

    def loss(self, run: Run, batch: Any, logits: Tensor, outputs: Any, units: float) -> Tensor:
        return (logits * torch.rand_like(logits)).square().sum() / units


def check_zero_weight(case: Case) -> None:
    """A further loss of weight 0 trains bit-identically to none; so do the method's own further losses."""
    own = [p for p in case.parts["objective"] if not isinstance(p, TaskLoss) and "weight" in _options(p)]
    plain = Case(case.name, lambda: _without(case.recipe(), own), case.base, case.lr)
    zero = Case(case.name, lambda: _weightless(case.recipe()), case.base, case.lr)
    wanted = start(training_run(plain, steps=2))
    found = start(training_run(zero, TaskLoss(), Extra(weight=0.0), steps=2))
    loud = start(training_run(plain, TaskLoss(), Extra(weight=1.0), steps=2))
    for name, value in wanted.items():
        same(found[name], value, f"{name} with a loss of weight 0")
    assert any(not torch.equal(loud[n], wanted[n]) for n in wanted), (
        "a loss of weight 1 changes nothing either"
    )


def _options(part: Part) -> list[str]:
    return list(inspect.signature(type(part)).parameters)


def _without(recipe: Recipe, own: list[Part]) -> Recipe:
    for slots in (recipe.essential, recipe.default):
        if "objective" in slots:
            slots["objective"] = [p for p in slots["objective"] if all(type(p) is not type(o) for o in own)]
    return recipe


def _weightless(recipe: Recipe) -> Recipe:
    for part in recipe["objective"]:
        if not isinstance(part, TaskLoss) and "weight" in _options(part):
            part.weight = 0.0  # type: ignore[attr-defined]
    return recipe


def _without_batchwise(recipe: Recipe) -> Recipe:
    for part in recipe["objective"]:
        if getattr(part, "batchwise", False):
            part.weight = 0.0  # type: ignore[attr-defined]
    return recipe


def check_loop_is_deterministic(case: Case) -> None:
    """A loop of the method's own gives the same result twice."""
    first, second = (start(training_run(case)) for _ in range(2))
    for name, value in first.items():
        same(second[name], value, f"{name} in a second run")


def accepted(case: Case) -> bool:
    """Whether the method can be attached to this base at all."""
    try:
        case.attach_or_raise(case.model())
    except UserError:
        return False
    return True
