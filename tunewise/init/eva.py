"""A = leading directions of the inputs, B = 0, ranks where they explain most (EVA)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from .base import Start
from .calibrate import DataInit
from .collect import Collector, Components

__all__ = ["EVA"]


class EVA(DataInit):
    """A = V_r', the leading right singular vectors of the centred inputs of the layer; B = 0, so W' = W.

    The sum of all ranks is shared out anew: of all layers' components those with the largest share of their
    layer's variance are kept, at most rho * rank per layer, at least none; alpha / rank stays the same for all.
    rho     1: every layer keeps its rank
    tau     components have converged when the cosine between successive estimates reaches this
    whiten  divides each direction by the root of its singular value
    rows    after so many rows calibration ends also where something has not converged (this is said)
    Source: arXiv 2410.07170; rule of convergence and of shares as in PEFT.
    """

    repeats: ClassVar[bool] = True
    rho: Annotated[float, Field(ge=1)] = 2.0
    tau: Annotated[float, Field(gt=0, lt=1)] = 0.99
    whiten: bool = False
    rows: PositiveInt = 4096

    def collector(self, width: int, rank: int) -> Collector:
        return Components(min(round(rank * self.rho), width))

    def ranks(self, found: Mapping[str, Any], rank: int) -> dict[str, int]:
        shares = [(name, j, float(v)) for name, c in found.items() for j, v in enumerate(c.ratios)]
        shares.sort(key=lambda share: (-share[2], share[1]))  # stable: equal shares in site order
        kept = [name for name, _, _ in shares[: rank * len(found)]]
        return {name: kept.count(name) for name in found}

    def wanted(self, found: Mapping[str, Any], rank: int) -> set[str]:
        needed = {name: c.count for name, c in found.items()}
        if not any(c.empty for c in found.values()):
            needed = self.ranks(found, rank)
        return {name for name, c in found.items() if bool((c.near[: needed[name]] < self.tau).any())}

    def factors(self, W: Tensor, rank: int, s: float, found: Any) -> Start:
        rows = found.components[:rank]
        if self.whiten:
            rows = rows / found.singular[:rank].sqrt().unsqueeze(-1)
        return Start(rows, torch.zeros(W.shape[-2], rank, device=W.device, dtype=W.dtype))
