"""LoRA switched off at random: once per step and site, without a trace in what is off."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.delta.small import attached, change_of, inputs, pair
from tunewise.core.run import Run
from tunewise.delta.deactivated import DeactivatedLoRA
from tunewise.delta.lora import LoRA


def drawn(part: DeactivatedLoRA, move: float = 0.3) -> tuple[Any, Any, Run]:
    model, handle = attached(part, move=move)
    return model.train(), handle, Run(handle)


def test_without_deactivation_it_is_lora() -> None:
    model, handle, run = drawn(DeactivatedLoRA(rank=2, alpha=3.0, deactivation=0.0))
    run.fire("before_step")
    other, lora = attached(LoRA(rank=2, alpha=3.0))
    lora.load_state({n.replace("deactivated_lora", "lora"): v for n, v in handle.state().items()})
    torch.testing.assert_close(model(inputs()), other(inputs()))


def test_always_off_trains_nothing_and_still_has_a_backward_pass() -> None:
    model, handle, run = drawn(DeactivatedLoRA(rank=2, deactivation=1.0))
    run.fire("before_step")
    before = {n: v.clone() for n, v in handle.state().items()}
    optimizer = torch.optim.AdamW(handle.parameters(), lr=0.1, weight_decay=0.5)
    torch.testing.assert_close(model(inputs()), pair()(inputs()))
    model(inputs()).sum().backward()
    optimizer.step()
    assert all(torch.equal(v, before[n]) for n, v in handle.state().items())


def test_the_mean_of_many_steps_is_the_evaluation() -> None:
    model, handle, run = drawn(DeactivatedLoRA(rank=2, deactivation=0.3))
    seen = []
    for _ in range(800):
        run.fire("before_step")
        seen.append(model[0](inputs()).detach())
    values = torch.stack(seen)
    assert len(values.unique(dim=0)) == 2
    wanted = model.eval()[0](inputs()).detach()
    error = values.std(0) / len(seen) ** 0.5
    assert bool(((values.mean(0) - wanted).abs() <= 4 * error + 1e-6).all())


def test_one_draw_holds_for_all_micro_batches_and_sites_differ() -> None:
    model, handle, run = drawn(DeactivatedLoRA(rank=2, deactivation=0.5))
    states = set()
    for _ in range(40):
        run.fire("before_step")
        assert torch.equal(model(inputs()), model(inputs()))
        states.add(tuple(t.active for _, _, t in handle.sites))
    assert len(states) == 4


@pytest.mark.parametrize("training", [True, False])
def test_merging_writes_the_expectation_in_either_mode(training: bool) -> None:
    model, handle, run = drawn(DeactivatedLoRA(rank=2, deactivation=0.3))
    run.fire("before_step")
    wanted = model.eval()(inputs())
    t = handle.sites[0][2]
    b, a = t.part.components(t)
    torch.testing.assert_close((b @ a).detach(), change_of(handle))
    model.train(training)
    handle.merge()
    torch.testing.assert_close(model(inputs()), wanted)
    assert all(t.training == training for _, _, t in handle.sites)
