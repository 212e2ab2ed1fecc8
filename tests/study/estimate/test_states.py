"""Frozen states in the estimate: found without values, and counted as a real run keeps and takes them."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import pytest
import torch

import tunewise as tw
from tunewise.assets import demo_rows
from tunewise.loop.features import Features
from tunewise.study.estimate.count import Counter, fake_mode
from tunewise.study.estimate.estimate import Estimate, estimate
from tunewise.study.estimate.timing import Clock

TOP_LORA = "lora(rank=2, sites='query & layers[-1]')"
STEPS = 6  # of one epoch
OPTIONS: dict[str, Any] = {"batch_size": 8, "max_length": 32, "device": "cpu"}


@cache
def rows() -> dict[str, list[dict[str, Any]]]:
    """A few real peptides: one epoch of training has six batches."""
    found = [{k: v for k, v in r.items() if k != "id"} for r in demo_rows("peptides")[::60]]
    return {"train": found[:48], "valid": found[48:60]}


@pytest.fixture(autouse=True)
def operations_as_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time does not depend on the machine."""
    monkeypatch.setattr(Clock, "seconds", lambda self, work: work.flops / 1e9)


def fresh(method: str, steps: int, evaluations: int = 0) -> Estimate:
    options = {"evaluations": evaluations}
    return estimate("tiny-roberta", rows(), method=method, steps=steps, options=options, **OPTIONS)


guess = cache(fresh)


@pytest.mark.parametrize(
    ("method", "blocks", "dtype"),
    [("partial", 2, "float32"), ("ladder", 4, "bfloat16"), (TOP_LORA, 3, "float32")],
)
def test_what_a_run_keeps_is_known_before(
    method: str, blocks: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {**OPTIONS, "method": method, "steps": 2 * STEPS, "dtype": dtype, "options": {"evaluations": 1}}
    found = estimate("tiny-roberta", rows(), **given)
    made: list[Features] = []
    plain = Features.installed

    def noted(self: Features) -> Any:
        made.append(self)
        return plain(self)

    monkeypatch.setattr(Features, "installed", noted)
    tw.tune("tiny-roberta", rows(), final_test=False, **given)
    assert made[-1].blocks == blocks
    # In another precision the run keeps the rows that it has tried a second time.
    exact = 1e-6 if dtype == "float32" else 0.01
    assert found.memory["frozen states"] * 2**20 == pytest.approx(made[-1].used, rel=exact)
    assert any(f"blocks 1 to {blocks}" in sentence for sentence in found.assumes)


def test_what_changes_the_first_block_keeps_nothing() -> None:
    once, again = guess("lora(rank=2)", STEPS), guess("lora(rank=2)", 3 * STEPS)
    assert again.step_gflops == once.step_gflops
    assert "frozen states" not in again.memory
    assert not any("kept (at most" in sentence for sentence in again.assumes)


def test_later_epochs_pass_the_upper_blocks_alone() -> None:
    once, again = guess("partial", STEPS), guess("partial", 3 * STEPS)
    assert once.step_gflops and again.step_gflops
    assert again.step_seconds == pytest.approx(again.step_gflops)
    # Of a step's products, forward through four like blocks and backward, twice as much, through the upper two.
    assert 3 * again.step_gflops / once.step_gflops == pytest.approx((8 + 2 * 6) / 8, rel=0.05)
    probe = guess("head_only", 3 * STEPS)
    assert probe.step_gflops == pytest.approx(guess("head_only", STEPS).step_gflops / 3, rel=0.05)  # type: ignore[operator]


def test_later_looks_are_cheap() -> None:
    one, six = (guess("head_only", STEPS, evaluations=count) for count in (1, 6))
    look, looks = (found.seconds - found.steps * found.step_seconds for found in (one, six))
    assert 0 < look <= looks < 1.1 * look


def test_what_finds_no_room_is_computed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, once = guess("partial", 3 * STEPS), guess("partial", STEPS)
    limit = int(whole.memory["frozen states"] * 2**20 / 2)
    monkeypatch.setattr(import_module("tunewise.tune"), "FEATURES", limit)
    half = fresh("partial", 3 * STEPS)
    assert half.memory["frozen states"] * 2**20 == pytest.approx(limit)
    assert whole.step_gflops and half.step_gflops and once.step_gflops
    assert half.step_gflops == pytest.approx((whole.step_gflops + once.step_gflops) / 2)
    assert half.alive_mb < whole.alive_mb


def test_measured_methods_keep_states_too(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = fresh("linear_probe", STEPS)
    assert probe.how == "measured" and any("once per row" in sentence for sentence in probe.assumes)

    def refuse(*_: Any) -> None:
        raise RuntimeError("no shape without values")

    monkeypatch.setattr("tunewise.study.estimate.steps.count_steps", refuse)
    probe = fresh("head_only", 3 * STEPS)
    assert probe.how == "measured" and any("once per row" in sentence for sentence in probe.assumes)
    assert probe.step_seconds > 0
    lora = fresh("lora(rank=2)", STEPS)
    assert lora.how == "measured" and not any("once per row" in sentence for sentence in lora.assumes)


def test_real_masks_decide_where_values_are_put() -> None:
    mode = fake_mode()
    values, mask = (
        mode.from_tensor(torch.ones(3, 4)),
        torch.tensor([[True, False, True], [False, True, False]]),
    )
    with Counter(mode) as counter:
        whole = values.new_zeros(2, 3, 4)
        whole[mask] = values
        assert whole.shape == (2, 3, 4)
    put = [call for call in counter.work.calls if "index_put" in str(call.func)]
    sizes = [leaf.size for leaf in put[0].leaves if hasattr(leaf, "size")]
    assert sizes == [(2, 3, 4), (3,), (3,), (3, 4)]  # the clock can execute it: one place per row of values
