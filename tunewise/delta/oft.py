"""x' = x R, R block-diagonal and orthogonal: rotations of the input by Cayley's map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from tunewise.core.delta import Delta, P
from tunewise.core.errors import UserError
from tunewise.core.run import Run
from tunewise.sites import Site

__all__ = ["OFT", "ConstrainedOFT", "turns"]


def turns(Q: Tensor, size: int, terms: int) -> Tensor:
    """R - I `[blocks, size, size]`, R Cayley's map of the skew-symmetric K with upper triangle Q `[blocks, pairs]`.

    terms=0: R = (I - K) (I + K)^-1, orthogonal to rounding, by a linear solve in float32. terms=n: R = (I + K)
    (I + K + ... + K^(n-2)), the cut Neumann series of (I + K) (I - K)^-1, off by 2 |K|^(n-1). The two turn in
    opposite directions: so does PEFT, whose tensors mean the same here. The identity is left to the caller
    because rounding R itself would lose small turns.
    """
    wide = Q.to(torch.promote_types(Q.dtype, torch.float32))
    rows, columns = torch.triu_indices(size, size, 1, device=Q.device)
    blocks = torch.arange(len(Q), device=Q.device)[:, None]
    upper = wide.new_zeros(len(Q), size, size).index_put((blocks, rows[None], columns[None]), wide)
    skew = upper - upper.mT
    one = torch.eye(size, dtype=wide.dtype, device=Q.device)
    if terms == 0:
        return torch.linalg.solve(one + skew, -2 * skew, left=False)
    shorter = one + skew
    for _ in range(terms - 4):
        shorter = one + skew @ shorter
    return skew @ (shorter + (one + skew @ shorter))


class OFT(Delta):
    """x' = x R before the layer, R = diag(R_1, ..., R_m) with blocks of `block_size`, R_i = I + `turns`(Q_i).

    So W' = W R^T: angles between the neurons' weights stay as they are. Q `[blocks, size (size - 1) / 2]`
    starts at 0 (R = I); with `block_share` one block stands for all. Blocks are applied as one batch of small
    products, never as a matrix `[in, in]`. Raises `UserError` where `block_size` does not divide the input
    size, and for some rows of a fused layer. Source: arXiv 2306.07280; input side and Neumann series: OFTv2,
    arXiv 2506.19847. Not here: the Cayley parameterisation of convolutions.
    """

    linear: ClassVar[bool] = True
    unit: ClassVar[str] = "block"
    block_size: PositiveInt = 32
    terms: NonNegativeInt = 5
    block_share: bool = False
    sites: str | list[str] = "linear"

    def tensors(self, site: Site) -> dict[str, P]:
        width, size = site.in_features or 0, self.block_size
        if site.rows is not None:
            raise UserError(
                f"OFT turns what the whole of {site.name} reads; {site.role} is only a part of its rows."
            )
        if 0 < self.terms < 4:
            raise UserError(
                f"OFT: terms={self.terms} is too few for a rotation; give at least 4, or 0 for the exact map."
            )
        if width % size or size < 2:
            below, above = _divisors_near(width, size)
            raise UserError(
                f"OFT: block_size={size} does not divide the {width} inputs of {site.name}; "
                f"{below} and {above} do."
            )
        blocks = 1 if self.block_share else width // size
        return {"Q": P(torch.zeros(blocks, size * (size - 1) // 2), "direction")}

    def input(self, t: Any, x: Tensor) -> Tensor:
        turn = turns(t.Q, self.block_size, self.terms).to(x.dtype)
        parts = x.unflatten(-1, (-1, self.block_size))
        if self.block_share:
            return x + (parts @ turn[0]).flatten(-2)
        return x + torch.einsum("...mi,mij->...mj", parts, turn).flatten(-2)

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        pairs = self.block_size * (self.block_size - 1) // 2
        return pairs if self.block_share else pairs * ((site.in_features or 0) // self.block_size)


class ConstrainedOFT(OFT):
    """OFT that stays near the identity: after every step |K_i| <= eps / sqrt(blocks), in the Frobenius norm.

    Source: COFT in arXiv 2306.07280, with the radius of PEFT's `coft=True`.
    """

    eps: PositiveFloat = 6e-5

    def after_step(self, run: Run) -> None:
        with torch.no_grad():
            for _, _, t in run.handle.sites:
                if t.part is self:
                    Q = t.get_parameter("Q")
                    norm = Q.norm(dim=1, keepdim=True) * 2**0.5  # every entry stands in K twice
                    Q.mul_((self.eps / len(Q) ** 0.5 / norm.clamp(min=1e-30)).clamp(max=1.0))


def _divisors_near(width: int, size: int) -> tuple[int, int]:
    found = [n for n in range(2, width + 1) if width % n == 0]
    return max((n for n in found if n < size), default=found[0]), min(
        (n for n in found if n > size), default=found[-1]
    )
