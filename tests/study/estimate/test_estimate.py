"""The estimate against what really happens: counts exactly, live bytes to the byte, and words when it cannot."""

from __future__ import annotations

import json
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn

from tunewise.assets import demo_rows
from tunewise.cli import run as run_cli
from tunewise.core.errors import UserError
from tunewise.study.estimate.count import Counter, bytes_of, fake_copy, fake_mode
from tunewise.study.estimate.estimate import estimate
from tunewise.study.estimate.timing import Clock

FAST: dict[str, Any] = {
    "batch_size": 8,
    "max_length": 32,
    "device": "cpu",
    "steps": 3,
    "options": {"evaluations": 1},
}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """A few real peptides."""
    return [{k: v for k, v in r.items() if k != "id"} for r in demo_rows("peptides")[::40]]


@pytest.mark.parametrize("method", ["lora(rank=2)", "full", "prefix_tuning"])
def test_counted_without_weights(method: str, rows: list[dict[str, Any]], monkeypatch: Any) -> None:
    import tunewise as tw

    monkeypatch.setattr(
        import_module("tunewise.backbone.load"), "_pretrained", None
    )  # reading weights would fail
    found = estimate("tiny-roberta", rows, method=method, **FAST)
    assert found.how == "counted" and found.steps == 3 and found.seconds > 0
    assert found.memory["moments"] == pytest.approx(2 * found.trainable * 4 / 2**20, rel=0.02)
    plan = tw.tune("tiny-roberta", rows, method=method, dry_run=True).plan
    assert plan is not None and plan["trainable"] == found.trainable


def test_another_loop_is_measured_and_says_so(rows: list[dict[str, Any]]) -> None:
    said: list[str] = []
    found = estimate("tiny-roberta", rows, method="linear_probe", say=said.append, **FAST)
    assert found.how == "measured" and "FitHead" in found.reason and found.peak_memory_mb > 0
    assert any("is measured on the loaded model" in sentence for sentence in said)


def test_what_cannot_be_counted_is_measured(rows: list[dict[str, Any]], monkeypatch: Any) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("no shape without values")

    monkeypatch.setattr("tunewise.study.estimate.steps.count_steps", refuse)
    found = estimate("tiny-roberta", rows, method="lora(rank=2)", **FAST)
    assert found.how == "measured" and "no shape without values" in found.reason
    assert found.step_seconds > 0 and found.seconds == pytest.approx(3 * found.step_seconds)


def test_live_bytes_are_exact() -> None:
    mode = fake_mode()
    model = fake_copy(nn.Linear(16, 4, bias=False), mode, torch.device("cpu"))
    x = mode.from_tensor(torch.ones(8, 16))
    counter = Counter(mode)
    counter.ignore([*model.parameters(), x])
    with counter:
        y = model(x)
        assert counter.live == 8 * 4 * 4
        z = y.tanh()
        assert counter.live == 2 * 8 * 4 * 4 and y.view(-1).shape == (32,)
        z.sum().backward()
    assert counter.work.flops == 2 * 2 * 8 * 16 * 4
    del y, z
    grads = bytes_of([p.grad for p in model.parameters() if p.grad is not None])
    assert counter.live == grads == 16 * 4 * 4
    assert counter.peak >= grads + 2 * 8 * 4 * 4


def test_real_masks_decide_shapes() -> None:
    mode = fake_mode()
    values = mode.from_tensor(torch.zeros(2, 3))
    mask = torch.tensor([[True, False, True], [False, True, False]])
    with Counter(mode):
        assert values[mask].shape == (3,) and values.masked_select(mask).shape == (3,)
        assert bool(mask.any()) and float(values.sum()) == 1.0


def test_the_clock_executes_each_distinct_call_once() -> None:
    mode = fake_mode()
    x = mode.from_tensor(torch.zeros(4, 4))
    with Counter(mode) as counter:
        for _ in range(5):
            x @ x
    assert list(counter.work.calls.values()) == [5]
    clock = Clock(torch.device("cpu"))
    assert clock.seconds(counter.work) > 0 and clock.rate > 0 and not clock.skipped


def test_large_calls_are_not_executed() -> None:
    mode = fake_mode()
    with mode:
        x = torch.empty(2**20, 2**20)  # 4 TiB
    with Counter(mode) as counter:
        x.add(1.0)
        x @ x
    assert Clock(torch.device("cpu")).seconds(counter.work) > 3600


def test_the_command(capsys: Any, tmp_path: Any, rows: list[dict[str, Any]]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    given = ["estimate", "tiny-roberta", str(file), "--method", "lora(rank=2)", "--steps", "3"]
    assert run_cli([*given, "--max-length", "32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 3 and found["trainable"] > 0 and found["assumes"]
    assert run_cli([*given, "--max-length", "32", "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert "peak memory" in shown and "timed on cpu" not in shown
    assert run_cli(["estimate", "tiny-roberta", "--method", "lora"]) == 2


def test_bad_input_is_refused_as_by_tune(rows: list[dict[str, Any]]) -> None:
    with pytest.raises(UserError, match="lora"):
        estimate("tiny-roberta", rows, method="lorra")
    with pytest.raises(UserError, match="setting"):
        estimate("tiny-roberta", rows, method="lora", options={"batchsize": 3})
