"""W' = W + s (B_1 + ... + B_n) A: a rank divided into n blocks that share their down-projection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor

from tunewise.core.delta import P
from tunewise.core.errors import UserError
from tunewise.sites import Site

from .own_start import OwnStart
from .random import kaiming

__all__ = ["BlockLoRA"]


class BlockLoRA(OwnStart):
    """W' = W + s (sum_i B_i) A, A `[rank / blocks, in]` shared, B `[blocks, out, rank / blocks]`, s = alpha / rank.

    This is LoRA of rank `rank / blocks` with `blocks` tied copies of B, an alias rather than a method of its own:
    every B_i starts at 0 and gets the gradient of every other, so the copies stay equal, and their sum moves
    `blocks` times as far per step as one B would. Compare it with `lora(rank=rank/blocks)` at `blocks` times its
    learning rate for B. Trainable scalars: rank out + rank / blocks in. Source: Block-LoRA, arXiv 2501.16720; no
    code is public, the sharing is the abstract's, the sum of blocks follows from it.
    """

    gives: ClassVar[frozenset[str]] = frozenset({"components", "sizes"})
    rank: PositiveInt = 16
    blocks: PositiveInt = 8

    def start(self, site: Site) -> dict[str, P]:
        if self.rank % self.blocks:
            raise UserError(
                f"BlockLoRA: rank={self.rank} cannot be divided into blocks={self.blocks} equal parts."
            )
        inner = self.rank // self.blocks
        return {
            "A": P(kaiming(inner, site.in_features or 0), "direction", 0),
            "B": P(torch.zeros(self.blocks, site.out_features or 0, inner), "direction", 2),
        }

    def trained(self, t: Any) -> tuple[Tensor, Tensor]:
        return t.A, t.B.sum(0)

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        return self.rank * (site.out_features or 0) + self.rank // self.blocks * (site.in_features or 0)
