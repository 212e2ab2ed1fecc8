"""Hydra: a branch beside the layer and one behind it, merged with weight and bias."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.delta.small import attached, change_of, inputs, pair
from tunewise.core.errors import UserError
from tunewise.delta.hydra import Hydra
from tunewise.delta.lora import LoRA


def tensors(handle: Any) -> dict[str, torch.Tensor]:
    return {n: handle.tensors()[f"0.hydra.{n}"].tensor.detach() for n in "ABCD"}


def test_merged_weight_and_bias_follow_the_formula() -> None:
    model, handle = attached(Hydra(rank=2, sequential=3, alpha=1.0, sites="linear"), move=0.4)
    base, t, s = pair()[0], tensors(handle), 0.5
    handle.merge()
    W = base.weight + s * (t["B"] @ t["A"] + t["D"] @ t["C"] @ base.weight)
    torch.testing.assert_close(model[0].weight, W.detach())
    torch.testing.assert_close(model[0].bias, (base.bias + s * t["D"] @ t["C"] @ base.bias).detach())


def test_one_branch_alone() -> None:
    model, _ = attached(Hydra(rank=2, sequential=0, alpha=3.0, sites="linear"), move=0.3)
    other, _ = attached(LoRA(rank=2, alpha=3.0), move=0.3)
    torch.testing.assert_close(model(inputs()), other(inputs()))
    model, handle = attached(Hydra(rank=0, sequential=2, alpha=2.0, sites="linear"), move=0.3)
    c, d = (handle.tensors()[f"0.hydra.{n}"].tensor for n in "CD")
    y = pair()[0](inputs())
    torch.testing.assert_close(model[0](inputs()), y + y @ c.T @ d.T)


def test_the_sequential_change_stays_in_the_row_space_of_the_weight() -> None:
    _, handle = attached(Hydra(rank=0, sequential=2, sites="linear"), move=0.4)
    W, change = pair()[0].weight.detach(), change_of(handle)
    assert torch.linalg.matrix_rank(torch.cat([W, change])) == torch.linalg.matrix_rank(W)
    d = handle.tensors()["0.hydra.D"].tensor.detach()
    assert torch.linalg.matrix_rank(torch.cat([d, change], 1)) == 2


def test_components_are_the_whole_change() -> None:
    _, handle = attached(Hydra(rank=2, sequential=3, sites="linear"), move=0.4)
    t = handle.sites[0][2]
    b, a = t.part.components(t)  # type: ignore[attr-defined]
    assert b.shape[1] == 5
    torch.testing.assert_close((b @ a).detach(), change_of(handle))


def test_no_branch_is_refused() -> None:
    with pytest.raises(UserError, match="no branch"):
        attached(Hydra(rank=0, sequential=0, sites="linear"))
