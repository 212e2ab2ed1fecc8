"""DSEE: few entries beside a low-rank change, and pruning on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.core.toys import interrupted, run_of, same_state, start
from tests.models import tiny
from tunewise.core.handle import attach
from tunewise.core.recipe import Recipe
from tunewise.delta.dsee import PrunedWeights
from tunewise.delta.lora import LoRA


def test_counts_and_the_common_scale() -> None:
    handle = attach(tiny("llama"), "dsee(rank=2, entries=10)")
    assert handle.trainable == sum(2 * (s.in_features + s.out_features) + 10 for _, s, t in handle.sites) // 2
    with torch.no_grad():
        for name, info in handle.tensors().items():
            if name.endswith("values"):
                info.tensor.fill_(0.5)
    for change in handle.materialize().values():
        assert int((change != 0).sum()) == 10 and float(change.max()) == pytest.approx(0.5 * 32 / 2)


def pruned(at: float) -> Recipe:
    return Recipe(delta=[PrunedWeights(0.5, at), LoRA(2)])


def zeros(run) -> float:  # type: ignore[no-untyped-def]
    weights = [
        t.part.weight(t, s.module.weight) for _, s, t in run.handle.sites if isinstance(t.part, PrunedWeights)
    ]
    return float(torch.cat([w.reshape(-1) == 0 for w in weights]).float().mean())


def test_the_smallest_weights_are_pruned_at_their_step_and_not_before() -> None:
    assert zeros(start(run_of(pruned(at=100), steps=3))) == 0.0
    run = start(run_of(pruned(at=0.5)))
    assert zeros(run) == pytest.approx(0.5, abs=1e-4)
    kept = [t.M for _, _, t in run.handle.sites if isinstance(t.part, PrunedWeights)]
    sizes = [s.module.weight.abs() for _, s, t in run.handle.sites if isinstance(t.part, PrunedWeights)]
    small = max(float(w[~m].max()) for w, m in zip(sizes, kept, strict=True))
    assert small <= min(float(w[m].min()) for w, m in zip(sizes, kept, strict=True))


@pytest.mark.parametrize("stop", [2, 4])
def test_pruning_resumes_bit_equal(stop: int, tmp_path: Path) -> None:
    whole = start(run_of(pruned(0.5), tmp_path / "whole", checkpoint_every=1))
    cut = interrupted(lambda: run_of(pruned(0.5), tmp_path / "cut", checkpoint_every=1), stop)
    assert same_state(whole, cut)


def test_dsee_with_pruning_is_one_method() -> None:
    run = start(run_of("dsee(rank=2, entries=8, sparsity=0.3)"))
    assert zeros(run) == pytest.approx(0.3, abs=1e-3)
