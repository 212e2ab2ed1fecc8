"""R = mean over factors of |M M' - I|: the directions of low-rank deltas are kept orthonormal."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from tunewise.core.errors import UserError
from tunewise.core.part import Part
from tunewise.core.run import Run

__all__ = ["Orthogonality", "off_orthonormal"]

SMALL = 1e-12


class Orthogonality(Part):
    """weight * mean over all trained A and B of |A A' - I|_F, |B' B - I|_F (not squared).

    The factors are the trained tensors of tag "direction" with an axis of rank. The norm is sqrt(sum of squares
    + 1e-12): it has a gradient, 0, where a start is exactly orthonormal. Source: AdaLoRA, arXiv 2303.10512;
    SORSA, arXiv 2409.00055.
    """

    slot: ClassVar[str] = "objective"
    weight: Annotated[float, Field(ge=0)] = 0.1

    def loss(self, run: Run, batch: Any, logits: Tensor, outputs: Any, units: float) -> Tensor:
        """The share of one micro-batch, so that a step counts it once."""
        factors = [
            (info.tensor, info.axis)
            for _, info in run.tensors.active()
            if info.tag == "direction" and info.axis is not None and info.tensor.shape[info.axis]
        ]
        if not factors:
            raise UserError(
                "Orthogonality needs a low-rank delta whose directions are trained, such as lora."
            )
        total = torch.stack([off_orthonormal(factor, axis) for factor, axis in factors]).mean()
        return total * (batch.units.sum() / units)


def off_orthonormal(factor: Tensor, axis: int) -> Tensor:
    """|M M' - I|_F, M with the ranks as rows, in float32 or wider; the mean over experts of a 3-D factor."""
    rows = factor.to(torch.promote_types(factor.dtype, torch.float32))
    rows = rows if axis == rows.dim() - 2 else rows.mT
    gram = rows @ rows.mT - torch.eye(rows.shape[-2], device=rows.device, dtype=rows.dtype)
    return (gram.square().sum((-1, -2)) + SMALL).sqrt().mean()
