"""Inference cost: a known time per row, a typical batch, and a handle that is left as it was."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

import tunewise as tw
from tests.models import tiny
from tunewise.core.errors import UserError
from tunewise.core.run import Run
from tunewise.diagnose.inference import inference_cost
from tunewise.loop.settings import Settings
from tunewise.task import Batch


class Task:
    """Rows of ones, as long as they say; remembers what was collated."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def collate(self, examples: list[dict[str, Any]], tokenizer: Any) -> Batch:
        self.lengths = [e["length"] for e in examples]
        ids = torch.ones(len(examples), max(self.lengths), dtype=torch.long)
        return Batch({"input_ids": ids}, None, [e["id"] for e in examples], torch.ones(len(examples)))


def run_of(method: str, size: int = 4, model: str = "bert") -> Run:
    handle = tw.attach(tiny(model), method, seed=0)
    return Run(handle, task=Task(), settings=Settings.of(eval_batch_size=size))


def examples(*lengths: int) -> list[dict[str, Any]]:
    return [{"id": str(i), "length": length} for i, length in enumerate(lengths)]


def test_the_time_is_per_thousand_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of("lora")
    seconds = iter([0.5, 0.01, 0.05, 0.01, 0.2, *[0.01] * 20])  # the first pass only warms up

    def work(batch: Any) -> None:
        end = time.process_time() + next(seconds)
        while time.process_time() < end:
            pass

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(run, "forward", work)
    assert inference_cost(run, examples(*[5] * 9))["inference_seconds"] == pytest.approx(2.5, rel=0.2)


def test_the_batch_is_as_long_as_batches_are_on_average() -> None:
    run = run_of("lora", size=2)
    # Sorted, the batches are padded to 2, 4 and 12: 6 on average, and 5 is the nearest row.
    inference_cost(run, examples(12, 1, 4, 2, 5, 3))
    assert run.task.lengths == [4, 5]
    inference_cost(run, examples(7))
    assert run.task.lengths == [7]


@pytest.mark.parametrize(
    ("method", "merged"),
    [
        ("lora", True),
        ("full", False),
        ("bias_scale", True),
        ("series_adapter", False),
        ("prompt_tuning", False),
    ],
)
def test_what_merges_is_timed_without_its_deltas(
    method: str, merged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(method)
    run.model.train()
    run.model.base_model.eval()  # type: ignore[union-attr]
    modes = [m.training for m in run.model.modules()]
    before = {n: v.clone() for n, v in run.model.state_dict().items()}
    calls, forward = list[int](), run.forward

    def counted(batch: Any) -> Any:
        start = sum(t.calls for _, _, t in run.handle.sites)
        found = forward(batch)
        assert not run.model.training
        calls.append(sum(t.calls for _, _, t in run.handle.sites) - start)
        return found

    monkeypatch.setattr(run, "forward", counted)
    assert inference_cost(run, examples(3, 4, 5, 6, 7))["inference_seconds"] > 0
    assert len(calls) >= 4
    assert all(n == 0 for n in calls) == (merged or method == "full")
    assert run.handle.active and run.handle.merged is None
    assert [m.training for m in run.model.modules()] == modes
    assert all(torch.equal(v, before[n]) for n, v in run.model.state_dict().items())
    ids = torch.ones(1, 3, dtype=torch.long)
    start = sum(t.calls for _, _, t in run.handle.sites)
    run.model(input_ids=ids)
    assert (sum(t.calls for _, _, t in run.handle.sites) > start) == (method != "full")


def test_a_merge_without_room_for_its_bias_is_timed_as_it_stands() -> None:
    run = run_of("bias_scale", model="llama")
    assert inference_cost(run, examples(3, 4))["inference_seconds"] > 0
    assert run.handle.active


def test_a_failing_pass_leaves_the_handle_on(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of("lora")

    def fail(batch: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(run, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        inference_cost(run, examples(3))
    assert run.handle.active


def test_no_rows_are_refused() -> None:
    with pytest.raises(UserError, match="no rows"):
        inference_cost(run_of("lora"), [])
