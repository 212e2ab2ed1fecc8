"""Two linear layers, 12 -> 8 -> 6, and what tests of deltas do with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tunewise.core.handle import Handle, attach

__all__ = ["attached", "change_of", "inputs", "moved", "pair"]


def pair(bias: bool = True) -> nn.Sequential:
    """The two layers, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 8, bias=bias), nn.Linear(8, 6, bias=bias)).eval()


def inputs(rows: int = 3) -> Tensor:
    """`[rows, 12]`."""
    return torch.randn(rows, 12, generator=torch.Generator().manual_seed(1))


def attached(
    part: Any, model: nn.Module | None = None, move: float = 0.0, **options: Any
) -> tuple[Any, Handle]:
    """(model, handle); with `move` every trained tensor has left its start."""
    model = pair() if model is None else model
    handle = attach(model, part, seed=0, **options)
    moved(handle, move)
    return model, handle


@torch.no_grad()
def moved(handle: Handle, size: float, seed: int = 2) -> None:
    """Seeded noise on every trained tensor."""
    make = torch.Generator().manual_seed(seed)
    for p in handle.parameters():
        p.add_(torch.randn(p.shape, generator=make) * size)


def change_of(handle: Handle, site: str = "0") -> Tensor:
    """W' - W of one layer."""
    return handle.materialize(site)[site]
