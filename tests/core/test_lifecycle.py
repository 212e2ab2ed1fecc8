"""Contract 6: the core calls the parts, in order and number, whatever the accumulation and across a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from tunewise.core.errors import RunError, UserError
from tunewise.core.handle import attach
from tunewise.core.lifecycle import call_order
from tunewise.core.part import EVENTS, STAGES, Part
from tunewise.core.recipe import Recipe
from tunewise.core.run import Run
from tunewise.delta.lora import LoRA
from tunewise.optim.adamw import AdamW

from .toys import Recorder, complete, interrupted, rows, run_of, start


class InAllocate(Recorder):
    slot: ClassVar[str] = "allocate"
    stage: ClassVar[str] = "project"


class InData(Recorder):
    slot: ClassVar[str] = "data"
    stage: ClassVar[str] = "private"


class InDataToo(Recorder):
    slot: ClassVar[str] = "data"
    stage: ClassVar[str] = "observe"


class InDiagnose(Recorder):
    slot: ClassVar[str] = "diagnose"
    stage: ClassVar[str] = "mask"


SLOT_ORDER = ["InAllocate", "InData", "InDataToo", "InDiagnose"]
STAGE_ORDER = ["InData", "InDataToo", "InDiagnose", "InAllocate"]


def recorded() -> Recipe:
    # Named out of order on purpose: slot order comes first, recipe order inside a slot.
    return Recipe(diagnose=InDiagnose(), data=[InData(), InDataToo()], delta=LoRA(2), allocate=InAllocate())


def expected(steps: int, per_epoch: int) -> list[str]:
    calls = [f"0 prepare {n}" for n in SLOT_ORDER]
    for step in range(steps):
        for event in ("select", "before_step"):
            calls += [f"{step} {event} {n}" for n in SLOT_ORDER]
        calls += [f"{step} gradients {n}" for n in STAGE_ORDER]
        calls += [f"{step + 1} after_step {n}" for n in SLOT_ORDER]
        if (step + 1) % per_epoch == 0:
            calls += [f"{step + 1} boundary:epoch {n}" for n in SLOT_ORDER]
    calls += [f"{steps} boundary:stage {n}" for n in SLOT_ORDER]
    return calls + [f"{steps} finish {n}" for n in SLOT_ORDER]


@pytest.mark.parametrize("micro", [8, 2], ids=["accumulation 1", "accumulation 4"])
def test_order_and_number_of_calls(micro: int) -> None:
    run = start(run_of(recorded(), micro_batch=micro))
    assert run.extra["calls"] == expected(steps=6, per_epoch=3)


@pytest.mark.parametrize("micro", [8, 2], ids=["accumulation 1", "accumulation 4"])
def test_order_and_number_of_calls_across_a_resume(tmp_path: Path, micro: int) -> None:
    made: list[Run] = []

    def make() -> Run:
        made.append(run_of(recorded(), tmp_path, micro_batch=micro, checkpoint_every=2))
        return made[-1]

    run = interrupted(make, step=5)  # the newest checkpoint is that of step 4
    assert made[1].model is not made[0].model
    assert run.extra["calls"] == expected(steps=6, per_epoch=3)
    assert run.lifecycle.fired["prepare"] == 1 and run.lifecycle.fired["gradients"] == 6


class Watch(Part):
    """Keeps the gradients of the first step, as parts see them."""

    slot: ClassVar[str] = "diagnose"

    def gradients(self, run: Run) -> None:
        if run.step == 0:
            self.state.update({n: i.tensor.grad.clone() for n, i in run.tensors.active()})  # type: ignore[union-attr]


def seen_gradients(**settings: Any) -> dict[str, torch.Tensor]:
    run = start(run_of(Recipe(delta=LoRA(2), diagnose=Watch()), dropout=False, steps=1, **settings))
    return dict(run.recipe["diagnose"][0].state)


def test_gradients_are_complete_and_unscaled() -> None:
    whole, cut = seen_gradients(), seen_gradients(micro_batch=2)
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, rtol=1e-5, atol=1e-6)
    run = run_of(Recipe(delta=LoRA(2)), dropout=False)  # by hand: the mean over the rows of the step
    batch = run.collate(next(run.batches("train", 8)))
    torch.nn.functional.cross_entropy(run.model(**batch.inputs).logits, batch.labels).backward()
    for name, info in run.tensors.active():
        torch.testing.assert_close(whole[name], info.tensor.grad, rtol=1e-5, atol=1e-6)


def test_gradients_are_unscaled_in_half_precision() -> None:
    whole, half = seen_gradients(), seen_gradients(dtype="float16")
    for name in whole:
        torch.testing.assert_close(half[name], whole[name], rtol=0.05, atol=2e-3)


def test_runs_of_different_precision_share_a_process() -> None:
    for dtype in ("float32", "bfloat16", "float32"):
        start(run_of("lora(rank=2)", steps=1, dtype=dtype))


class Double(Recorder):
    """Doubles gradients before the optimizer clips them, so clipping must still win."""

    slot: ClassVar[str] = "data"
    stage: ClassVar[str] = "mask"


def test_the_optimizers_clipping_has_its_place_among_the_stages() -> None:
    order = call_order(complete(recorded() + Double()))["gradients"]
    assert [type(p).__name__ for p in order] == [
        "InData",
        "InDataToo",
        "Double",
        "InDiagnose",
        "AdamW",
        "InAllocate",
    ]
    assert STAGES.index("clip") < STAGES.index("project") < STAGES.index("rule")


class ProjectA(InAllocate):
    pass


class ProjectB(InDiagnose):
    stage: ClassVar[str] = "project"


class Misplaced(InDiagnose):
    stage: ClassVar[str] = "projekt"


def test_two_projections_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="Only one part may project the gradients, not ProjectA and ProjectB"):
        run_of(Recipe(delta=LoRA(2), allocate=ProjectA(), diagnose=ProjectB()))


def test_an_unknown_gradient_stage_is_refused() -> None:
    with pytest.raises(UserError, match="Misplaced has no gradient stage 'projekt'"):
        run_of(Recipe(delta=LoRA(2), diagnose=Misplaced()))


class Half(Part):
    """Only every second row of a batch."""

    slot: ClassVar[str] = "data"
    keep: int = 2

    def select(self, run: Run, ids: list[str]) -> list[str]:
        return ids[:: self.keep] if self.keep else []


class Count(Part):
    slot: ClassVar[str] = "diagnose"

    def after_step(self, run: Run) -> None:
        self.state["rows"] = self.state.get("rows", []) + [sorted(run.sample_losses)]


def test_select_drops_rows_before_micro_batches_are_cut() -> None:
    run = start(run_of(Recipe(delta=LoRA(2), data=Half(), diagnose=Count()), micro_batch=2, steps=3))
    seen = run.recipe["diagnose"][0].state["rows"]
    assert [len(s) for s in seen] == [4, 4, 4]
    assert {i for s in seen for i in s} < {e["id"] for e in rows(24)}


def test_a_selector_that_refuses_everything_ends_the_run() -> None:
    with pytest.raises(RunError, match="No row was left at step 1"):
        start(run_of(Recipe(delta=LoRA(2), data=Half(0))))


def test_the_handle_fires_the_events_in_ones_own_loop() -> None:
    handle = attach(run_of("lora").model, recorded(), name="own")
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
    run = handle.watch(optimizer)
    ids = torch.randint(3, 99, (2, 6))
    for _ in range(2):
        optimizer.zero_grad()
        handle.model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
    calls = [c.rpartition(" ")[0] for c in run.extra["calls"] if c.endswith("InData")]
    assert calls == [
        "0 prepare",
        "0 before_step",
        "0 gradients",
        "1 after_step",
        "1 before_step",
        "1 gradients",
    ] + ["2 after_step", "2 before_step"]


def test_an_event_that_is_needed_and_never_comes_is_an_error(tmp_path: Path) -> None:
    run = run_of(recorded())
    run.handle.run = run
    with pytest.raises(
        UserError, match="InAllocate, InData, InDataToo, InDiagnose needs the event before_step"
    ):
        run.handle.save(tmp_path)


def test_the_names_of_events_are_fixed() -> None:
    assert EVENTS == ("prepare", "select", "before_step", "gradients", "after_step", "boundary", "finish")
    assert AdamW.stage == "clip"
