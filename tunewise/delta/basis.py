"""sum_j c_j M_j / sqrt(k) over a random basis that is drawn anew from its seed whenever it is needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["mix_basis", "project_basis"]

CHUNK = 2**20


def _rows(count: int, size: int, seed: int) -> Iterator[tuple[slice, Tensor]]:
    """The basis, uniform in (-1, 1), some rows `[n, size]` at a time: the same on every device."""
    make, n = torch.Generator("cpu").manual_seed(seed), max(CHUNK // size, 1)
    for first in range(0, count, n):
        here = slice(first, min(first + n, count))
        rows = torch.empty(here.stop - first, size, dtype=torch.float32, device="cpu")
        yield here, rows.uniform_(-1, 1, generator=make)


@torch.library.custom_op("tunewise::mix_basis", mutates_args=())
def mix_basis(c: Tensor, seed: Tensor, size: int) -> Tensor:
    """sum_j c_j M_j / sqrt(k), `[size]`, for c `[k]` and M `[k, size]` uniform in (-1, 1) from `seed`.

    Neither pass stores M: the backward pass draws it again (dL/dc = M dL/dy / sqrt(k)). Sums are taken in float32
    or wider. Differentiable any number of times. Cost: k size draws and multiply-adds, on the CPU's generator.
    """
    total = c.new_zeros(size, dtype=torch.promote_types(c.dtype, torch.float32))
    for here, rows in _rows(len(c), size, int(seed)):
        total += c[here].to(total.dtype) @ rows.to(total)
    return (total / len(c) ** 0.5).to(c.dtype)


@torch.library.custom_op("tunewise::project_basis", mutates_args=())
def project_basis(y: Tensor, seed: Tensor, count: int) -> Tensor:
    """M y / sqrt(k), `[count]`: the transpose of `mix_basis`."""
    total = y.new_zeros(count, dtype=torch.promote_types(y.dtype, torch.float32))
    wide = y.to(total.dtype)
    for here, rows in _rows(count, len(y), int(seed)):
        total[here] = rows.to(total) @ wide
    return (total / count**0.5).to(y.dtype)


@mix_basis.register_fake
def _(c: Tensor, seed: Tensor, size: int) -> Tensor:
    return c.new_empty(size)


@project_basis.register_fake
def _(y: Tensor, seed: Tensor, count: int) -> Tensor:
    return y.new_empty(count)


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    ctx.count = len(inputs[0])
    ctx.save_for_backward(inputs[1])


def _mix_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return project_basis(grad.contiguous(), ctx.saved_tensors[0], ctx.count), None, None


def _project_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return mix_basis(grad.contiguous(), ctx.saved_tensors[0], ctx.count), None, None


mix_basis.register_autograd(_mix_backward, setup_context=_remember)
project_basis.register_autograd(_project_backward, setup_context=_remember)
