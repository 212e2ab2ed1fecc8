"""Comp-LoRA: the leading singular directions of W are never touched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.delta.small import attached, change_of, inputs, moved, pair
from tunewise.core.errors import UserError
from tunewise.core.handle import restore
from tunewise.delta.comp_lora import CompLoRA, leading_directions
from tunewise.delta.lora import LoRA


def test_the_change_is_orthogonal_to_the_leading_directions() -> None:
    model, handle = attached(CompLoRA(rank=3, directions=2), move=0.5)
    W, change = pair()[0].weight.detach(), change_of(handle)
    u, s, vh = torch.linalg.svd(W)
    assert change.abs().max() > 0.1
    assert (u[:, :2].T @ change).abs().max() < 1e-5 and (change @ vh[:2].T).abs().max() < 1e-5
    moved_little = W + change * (0.5 * s[1] / torch.linalg.matrix_norm(change, 2))
    torch.testing.assert_close(torch.linalg.svdvals(moved_little)[:2], s[:2])


def test_energy_decides_how_many_directions_stay() -> None:
    W = torch.diag(torch.tensor([2.0, 1.0, 1.0, 1.0]))  # squares 4, 1, 1, 1
    assert [leading_directions(W, e, None)[0].shape[1] for e in (0.0, 0.5, 0.6, 0.72, 0.99)] == [
        0,
        1,
        2,
        3,
        3,
    ]
    assert leading_directions(torch.zeros(4, 4), 0.5, None)[0].shape[1] == 3


def test_no_direction_is_lora() -> None:
    model, _ = attached(CompLoRA(rank=2, directions=0), move=0.3)
    other, _ = attached(LoRA(rank=2), move=0.3)
    torch.testing.assert_close(model(inputs()), other(inputs()))


def test_directions_are_saved_and_not_computed_anew(tmp_path: Path) -> None:
    model, handle = attached(CompLoRA(rank=2, directions=3), move=0.3)
    handle.save(tmp_path)
    other = pair()
    with torch.no_grad():
        other[0].weight.copy_(torch.eye(8, 12))
    assert torch.equal(restore(other, tmp_path).state()["0.comp_lora.V"], handle.state()["0.comp_lora.V"])


def test_too_many_directions_are_refused() -> None:
    model = pair()
    with pytest.raises(UserError, match="directions=6"):
        attached(CompLoRA(directions=6), model)
    moved(attached(CompLoRA(directions=5), model)[1], 0.1)
