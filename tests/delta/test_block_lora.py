"""Block-LoRA is LoRA of rank / blocks, with copies of B that stay equal."""

from __future__ import annotations

import pytest
import torch

from tests.delta.small import attached, change_of, inputs
from tunewise.core.errors import UserError
from tunewise.delta.block_lora import BlockLoRA
from tunewise.delta.lora import LoRA


def test_equals_lora_with_the_sum_of_the_blocks() -> None:
    model, handle = attached(BlockLoRA(rank=6, blocks=3, alpha=6.0), move=0.3)
    other, lora = attached(LoRA(rank=2, alpha=2.0))
    with torch.no_grad():
        for site in "01":
            lora.tensors()[f"{site}.lora.A"].tensor.copy_(handle.tensors()[f"{site}.block_lora.A"].tensor)
            lora.tensors()[f"{site}.lora.B"].tensor.copy_(
                handle.tensors()[f"{site}.block_lora.B"].tensor.sum(0)
            )
    torch.testing.assert_close(model(inputs()), other(inputs()))
    assert torch.linalg.matrix_rank(change_of(handle)) == 2


def test_every_copy_gets_the_same_gradient_and_stays_equal() -> None:
    model, handle = attached(BlockLoRA(rank=6, blocks=3))
    optimizer = torch.optim.AdamW(handle.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(inputs()).square().sum().backward()
        optimizer.step()
    b = handle.tensors()["0.block_lora.B"].tensor
    assert bool(b.any())
    assert torch.equal(b[0], b[1]) and torch.equal(b[0], b[2])


def test_one_block_is_lora() -> None:
    model, _ = attached(BlockLoRA(rank=2, blocks=1, alpha=3.0), move=0.3)
    other, _ = attached(LoRA(rank=2, alpha=3.0), move=0.3)
    torch.testing.assert_close(model(inputs()), other(inputs()))


def test_ranks_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(UserError, match="blocks=4"):
        attached(BlockLoRA(rank=6, blocks=4))
