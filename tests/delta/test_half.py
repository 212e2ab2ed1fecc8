"""Half fine-tuning: what is drawn, what stays, what a new stage changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.core.toys import interrupted, run_of, same_state, start
from tests.models import tiny
from tunewise.core.errors import UserError
from tunewise.core.handle import attach
from tunewise.delta.half import HalfWeights, frozen_half
from tunewise.post.half_reset import half_reset


def draw(
    name: str = "llama", share: float = 0.5, level: str = "category", seed: int = 0, stage: int = 0
) -> set[str]:
    return frozen_half(tiny(name), share, level, seed, stage)


def test_half_of_each_category_in_every_block() -> None:
    for seed in range(5):
        frozen = draw(seed=seed)
        mlp = []
        for layer in range(2):
            mine = [n for n in frozen if n.startswith(f"model.layers.{layer}.")]
            assert sum("self_attn" in n for n in mine) == 2
            assert sum("layernorm" in n for n in mine) == 1
            mlp.append(sum(".mlp." in n for n in mine))
        assert sorted(mlp) == [1, 2]
    assert not any("embed" in n or "lm_head" in n or n == "model.norm.weight" for n in frozen)


def test_biases_go_with_their_matrix() -> None:
    for name in (frozen := draw("bert")):
        stem = name.rpartition(".")[0]
        assert {f"{stem}.weight", f"{stem}.bias"} <= frozen


def test_draws_are_functions_of_seed_and_stage() -> None:
    assert draw() == draw()
    assert len({frozenset(draw(seed=s, stage=t)) for s in range(3) for t in range(3)}) > 6


@pytest.mark.parametrize("level", ["category", "model", "layer"])
def test_share_and_levels(level: str) -> None:
    assert draw(level=level, share=1.0) == set()
    frozen = draw(level=level)
    total = {n for n, _ in tiny("llama").named_parameters() if ".layers." in n}
    assert 0.4 < len(frozen) / len(total) < 0.6
    if level == "layer":
        assert len({n.split(".")[2] for n in frozen}) == 1


def test_fused_projections_are_refused() -> None:
    with pytest.raises(UserError, match="several matrices in one tensor"):
        attach(tiny("gpt2"), "hft")


def test_frozen_matrices_are_bit_identical_and_have_no_moments() -> None:
    run = start(run_of("hft", steps=3, batch_size=24, lr=1e-3))
    first = frozen_half(run.model, 0.5, "category", 0, 0)
    fixed = dict(tiny("bert").named_parameters())
    for name, e in run.handle.existing.items():
        if name in first:
            assert torch.equal(e.ours, fixed[name]), name
        elif "classifier" not in name and "pooler" not in name:
            assert not torch.equal(e.ours, fixed[name]), name


def test_each_stage_draws_another_half() -> None:
    run = run_of("hft(seed=4)")
    run.fire("prepare")
    first = set(run.tensors.frozen)
    assert first == frozen_half(run.model, 0.5, "category", 4, 0)
    run.fire("boundary", "epoch")
    assert run.tensors.frozen == first
    run.fire("boundary", "stage")
    assert run.tensors.frozen == frozen_half(run.model, 0.5, "category", 4, 1) != first
    for name, info in run.tensors.all().items():
        assert info.tensor.requires_grad == (name not in run.tensors.frozen)


def test_resumes_with_the_same_half(tmp_path: Path) -> None:
    whole = start(run_of("hft", tmp_path / "whole", checkpoint_every=1, lr=1e-3))
    cut = interrupted(lambda: run_of("hft", tmp_path / "cut", checkpoint_every=1, lr=1e-3), 3)
    assert same_state(whole, cut)


def test_everything_trained_equals_full_tuning() -> None:
    half, full = (start(run_of(m, lr=1e-3)).handle.state() for m in ("hft(share=1.0)", "full"))
    assert half.keys() == full.keys() and all(torch.equal(half[n], full[n]) for n in full)


def test_a_loop_without_events_cannot_save(tmp_path: Path) -> None:
    model = tiny("llama")
    handle = attach(model, "hft")
    model(input_ids=torch.arange(6).view(1, 6), labels=torch.arange(6).view(1, 6)).loss.backward()
    with pytest.raises(UserError, match="HalfWeights needs the event prepare"):
        handle.save(tmp_path)


def test_half_reset_takes_back_what_half_tuning_would_have_frozen() -> None:
    model = tiny("llama")
    handle = attach(model, "full")
    assert isinstance(HalfWeights(), HalfWeights)
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(0.1)
    frozen = draw(seed=2)
    count = half_reset(handle, seed=2)
    for name, e in handle.existing.items():
        assert torch.equal(e.ours, e.original) == (name in frozen), name
    assert count == sum(handle.existing[n].ours.numel() for n in frozen)
    with pytest.raises(UserError, match="originals"):
        half_reset(attach(tiny("llama"), "lora"))
