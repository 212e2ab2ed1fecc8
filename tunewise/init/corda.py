"""s B A = U_K S_K V_K' C^-1 of W C = U S V': directions of W weighed by what its inputs are (CorDA)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from tunewise.core.errors import RunError

from .base import Start
from .calibrate import DataInit
from .collect import Collector, Covariance
from .svd import split

__all__ = ["CorDA"]

DAMP, ERROR, DOUBLINGS = 0.01, 0.05, 60


class CorDA(DataInit):
    """B = U_K sqrt(S_K / s), A = sqrt(S_K / s) V_K' C^-1, with W C = U S V' and C the covariance of the inputs.

    mode  "ipm" trains the r largest components (calibrate with rows of the task), "kpm" the r smallest (with
          rows of what is to be kept)
    rows  how many rows calibration reads
    C is damped by c mean(diag C) I, c = 0.01 doubled until |C C^-1 - I| < 0.05 (Frobenius). What A and B hold
    is taken from W, so that W' = W at step 0. Source: arXiv 2406.05223; damping and the weights of batches as
    in PEFT. C is divided by mean(diag C), which changes neither B A nor the rest of W, but how large A is
    beside B: unlike there it does not depend on tokens per batch, and short texts train as long ones do.
    """

    residual: ClassVar[bool] = True
    mode: Literal["ipm", "kpm"] = "ipm"
    rows: PositiveInt = 256

    def collector(self, width: int, rank: int) -> Collector:
        return Covariance()

    def factors(self, W: Tensor, rank: int, s: float, found: Any) -> Start:
        c = found.value.to(W.device, W.dtype)
        c, inverse = damped(c / c.diagonal().mean())
        u, sigma, v = torch.linalg.svd(W @ c, full_matrices=False)
        chosen = slice(rank) if self.mode == "ipm" else slice(len(sigma) - rank, None)
        return split(u[:, chosen], sigma[chosen], v[chosen] @ inverse, s)


def damped(c: Tensor) -> tuple[Tensor, Tensor]:
    """(C~, its inverse), C~ = C + damp mean(diag C) I with the first damp of 0.01, 0.02, ... that can be inverted."""
    unit = torch.eye(len(c), device=c.device, dtype=c.dtype)
    damp = DAMP
    for _ in range(DOUBLINGS):
        fixed = c + unit * (damp * c.diagonal().mean())
        inverse, failed = torch.linalg.inv_ex(fixed)
        if not int(failed) and float((fixed @ inverse - unit).norm()) < ERROR:
            return fixed, inverse
        damp *= 2
    raise RunError(
        "CorDA: the inputs of a layer have no covariance that can be inverted: they are 0 or not finite."
    )
