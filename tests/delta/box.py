"""A model that holds one layer."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["Box"]


class Box(nn.Module):
    """One linear layer inside a model."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        self.inner = nn.Linear(columns, rows)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]
