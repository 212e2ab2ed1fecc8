"""W' = W + [D^T, ..., D^T]: one small matrix shared by all blocks of input columns; and its block affine kin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor

from tunewise.core.delta import Delta, P
from tunewise.core.errors import UserError
from tunewise.sites import Site

from .fused import changed_linear
from .kernels import drop

__all__ = ["BlockAffine", "MiSS"]


class MiSS(Delta):
    """W' = W + [D^T, D^T, ...] cut to `[out, in]`, D `[rank, out]` starting at 0; y' = y + D^T (x_1 + x_2 + ...).

    x_c are the blocks of `rank` inputs, the last one filled up with zeros, so a token costs one sum and rank out
    multiply-adds. With `mini` only D_mini `[rank, mini]` is trained and D = [D_mini, D_mini, ...] along out. The
    rank of W' - W is at most `rank`; there is no factor alpha / rank. Dropout comes before the sum. D gathers the
    gradients of all in / rank blocks, so it wants a lower learning rate than LoRA. Trainable scalars: rank out, or
    rank mini. Source: MiSS (earlier Bone, DiSHA), arXiv 2409.15371; numbers equal PEFT's `miss`.
    """

    gives: ClassVar[frozenset[str]] = frozenset({"components"})
    rank: PositiveInt = 32
    mini: PositiveInt | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    sites: str | list[str] = "linear"

    def tensors(self, site: Site) -> dict[str, P]:
        rows, columns = site.out_features or 0, site.in_features or 0
        if self.rank > columns:
            raise UserError(f"MiSS: rank={self.rank} is more than the {columns} inputs of {site.name}.")
        if rows % (self.mini or 1):
            raise UserError(f"MiSS: mini={self.mini} does not divide the {rows} outputs of {site.name}.")
        like = P(torch.empty(rows, columns, 0), trainable=False, saved=False)  # sizes, and no entries
        return {"D": P(torch.zeros(self.rank, self.mini or rows), "direction"), "like": like}

    def _whole(self, t: Any, rows: int) -> Tensor:
        return t.D if self.mini is None else t.D.repeat(1, rows // self.mini)

    def weight(self, t: Any, W: Tensor) -> Tensor:
        rows, columns = W.shape
        tiled = self._whole(t, rows).T.repeat(1, -(-columns // self.rank))
        return W + tiled[:, :columns]

    def output(self, t: Any, x: Tensor, y: Tensor) -> Tensor:
        h = drop(x, self.dropout, t.training).to(t.D.dtype)
        h = F.pad(h, (0, -h.shape[-1] % self.rank)).unflatten(-1, (-1, self.rank)).sum(-2)
        return y + h @ self._whole(t, y.shape[-1])

    def components(self, t: Any) -> tuple[Tensor, Tensor]:
        """(D^T, [I, I, ...]): their product is W' - W."""
        rows, columns, _ = t.like.shape
        eye = torch.eye(self.rank, device=t.D.device, dtype=t.D.dtype)
        return self._whole(t, rows).T, eye.repeat(1, -(-columns // self.rank))[:, :columns]

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        return self.rank * (self.mini or site.out_features or 0)


def _affine(W: Tensor, D: Tensor) -> Tensor:
    rows, columns = W.shape
    n, rank, _ = D.shape
    blocks = W.reshape(n, rank, columns // rank, rank)
    return W + (torch.einsum("aicj,ajk->aick", blocks, D) + D.unsqueeze(2)).reshape(rows, columns)


class BlockAffine(Delta):
    """W'_ac = W_ac (I + D_a) + D_a for every block W_ac `[rank, rank]` of W, D `[out / rank, rank, rank]` starting
    at 0.

    Not low-rank and not additive: the change depends on W. Both sizes of W must be multiples of `rank`. W' is
    built once per pass, rank out in multiply-adds whatever the number of tokens. Trainable scalars: rank out. Source:
    "bat" of MiSS (earlier Bone, DiSHA), arXiv 2409.15371; numbers equal PEFT's `miss` with init_weights="bat".
    """

    order: ClassVar[str] = "multiply"
    rank: PositiveInt = 32
    sites: str | list[str] = "linear"

    def tensors(self, site: Site) -> dict[str, P]:
        rows, columns = site.out_features or 0, site.in_features or 0
        if rows % self.rank or columns % self.rank:
            raise UserError(
                f"BlockAffine: rank={self.rank} does not divide {site.name}, which is {rows} x {columns}."
            )
        return {"D": P(torch.zeros(rows // self.rank, self.rank, self.rank), "direction")}

    def weight(self, t: Any, W: Tensor) -> Tensor:
        return _affine(W, t.D)

    def product(self, t: Any, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return changed_linear(_affine, x, W, b, t.D)

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        return self.rank * (site.out_features or 0)
