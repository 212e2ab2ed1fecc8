"""s B A = U_r S_r V_r': the largest singular directions of W (PiSSA)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from .base import Init, Start

__all__ = ["SVD", "split", "top_svd"]

OVERSAMPLING = 8
SEED = 42


class SVD(Init):
    """B = U_r sqrt(S_r / s), A = sqrt(S_r / s) V_r' of W = U S V'; what they hold is taken from W.

    method      "exact", or "random": a range finder on rank + 8 random directions
    iterations  power iterations of "random"; its error falls with the spectrum's gap to this power
    Dropout acts on B A alone, so that step 0 is W' = W in evaluation only. Source: PiSSA, arXiv 2404.02948.
    """

    residual: ClassVar[bool] = True
    method: Literal["exact", "random"] = "exact"
    iterations: PositiveInt = 4

    def factors(self, W: Tensor, rank: int, s: float, found: Any) -> Start:
        iterations = self.iterations if self.method == "random" else None
        return split(*top_svd(W, rank, iterations), s)


def split(u: Tensor, sigma: Tensor, v: Tensor, s: float) -> Start:
    """B = U sqrt(S / s), A = sqrt(S / s) V'; u `[..., out, r]`, sigma `[..., r]`, v `[..., r, in]`."""
    root = (sigma / s).sqrt()
    return Start(root.unsqueeze(-1) * v, u * root.unsqueeze(-2))


def top_svd(W: Tensor, rank: int, iterations: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(U `[..., out, r]`, S `[..., r]`, V' `[..., r, in]`), exact, or randomised with so many power iterations.

    The random directions are the same ones whatever torch's random state. Source: arXiv 0909.4061.
    """
    size = rank + OVERSAMPLING
    if iterations is None or size >= min(W.shape[-2:]):
        u, sigma, v = torch.linalg.svd(W, full_matrices=False)
        return u[..., :rank], sigma[..., :rank], v[..., :rank, :]
    make = torch.Generator().manual_seed(SEED)
    q = W @ torch.randn(W.shape[-1], size, generator=make).to(W.device, W.dtype)
    for _ in range(iterations):  # orthonormal in between: powers of the spectrum leave the range of floats
        q = torch.linalg.qr(W.mT @ torch.linalg.qr(q).Q).Q
        q = W @ q
    q = torch.linalg.qr(q).Q
    u, sigma, v = torch.linalg.svd(q.mT @ W, full_matrices=False)
    return (q @ u)[..., :rank], sigma[..., :rank], v[..., :rank, :]
