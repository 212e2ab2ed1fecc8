"""y' = e^s (y + w a T): what prompts would add to an attention's answer, without attending to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from tunewise.core.delta import Delta, P
from tunewise.sites import Site

__all__ = ["ApproximatedPrompt"]


class ApproximatedPrompt(Delta):
    """y' = e^s (y + w a T), a = relu(x K'), K = T + T M_1 M_2, w = max_j a_j without gradient.

    x is the attention's input and y its output before the residual, both `[..., width]`; T `[tokens, width]` starts
    at N(0, 0.02), M_1 `[width, rank]` at N(0, 1), M_2 `[rank, width]` and s at 0, so that step 0 is near the base.
    x is what the attention gets: the residual stream where the norm comes after (BERT, as published), the normed
    one where it comes before. No token is added anywhere: cost grows with the length of the text, and a cache is
    not touched. Trainable scalars: tokens width + 2 rank width + 1. Source: APT, arXiv 2306.15706.
    """

    kinds: ClassVar[tuple[str, ...]] = ("attention",)
    identity: ClassVar[bool] = False
    unit: ClassVar[str] = "token"
    tokens: PositiveInt = 200
    rank: PositiveInt = 4
    sites: str | list[str] = "attention"

    def tensors(self, site: Site) -> dict[str, P]:
        width = site.out_features
        assert width is not None
        return {
            "T": P(torch.randn(self.tokens, width) * 0.02, "prompt", 0),
            "M1": P(torch.randn(width, self.rank), "direction"),
            "M2": P(torch.zeros(self.rank, width), "direction"),
            "s": P(torch.zeros(1), "scale"),
        }

    def output(self, t: Any, x: Tensor, y: Tensor) -> Tensor:
        keys = t.T + t.T @ t.M1 @ t.M2
        a = F.relu(F.linear(x.to(keys.dtype), keys))
        most = a.detach().amax(-1, keepdim=True)
        return t.s.exp() * (y + most * (a @ t.T))

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        return (self.tokens + 2 * self.rank) * (site.out_features or 0) + 1
