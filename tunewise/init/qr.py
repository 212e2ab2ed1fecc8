"""B A = Q_r R_r: the first directions of W = Q R (OLoRA)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Init, Start

__all__ = ["QR"]


class QR(Init):
    """B = Q_r (orthonormal columns), A = R_r of W = Q R; s Q_r R_r is taken from W, so that W' = W at step 0.

    As published the factors are not divided by s: with s other than 1 (alpha other than rank) another multiple
    than W's own part is taken away and trained. Source: OLoRA, arXiv 2406.01775.
    """

    residual: ClassVar[bool] = True

    def factors(self, W: Tensor, rank: int, s: float, found: Any) -> Start:
        q, r = torch.linalg.qr(W)
        return Start(r[..., :rank, :], q[..., :rank])
