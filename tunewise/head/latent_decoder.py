"""A shallow decoder on the latents of a frozen model, for a target that it was not trained for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Tensor, nn

from tunewise.core.delta import P
from tunewise.sites import Site

from .base import hidden_size
from .pooled import PooledHead

__all__ = ["LatentDecoder"]


class LatentDecoder(PooledHead):
    """D(z) = W_2 gelu(W_1 LN(z) + b_1) + b_2 in float32, W_1 `[ratio * width, width]`, on the last hidden states z.

    pooling  "mean", "first" or "last": D is applied to the pooled latent and gives `[rows, outputs]`; "none": to every
             token or patch, `[rows, tokens, outputs]`, for dense targets
    W_2 and b_2 start at 0, so that the first answer is the same for every row. The model's own outputs stay bit for
    bit what they were, nothing is sent back into it, and decoders of several targets learn what each would learn
    alone. Trainable scalars: with m = ratio width, 2 width + m (width + 1) + outputs (m + 1).
    Our reading: the sizes; the paper's area weights and lead times belong to its weather data. Source: arXiv
    2506.19088.
    """

    pooling: Literal["mean", "first", "last", "none"] = "mean"  # type: ignore[assignment]
    ratio: PositiveFloat = 1.0

    def _width(self, site: Site) -> tuple[int, int]:
        width = hidden_size(site.module, "LatentDecoder")
        return width, max(round(self.ratio * width), 1)

    def tensors(self, site: Site) -> dict[str, P]:
        last = super().tensors(site)
        width, inner = self._width(site)
        first = nn.Linear(width, inner)
        return {
            "gain": P(torch.ones(width), "head"),
            "shift": P(torch.zeros(width), "head"),
            "weight1": P(first.weight.detach(), "head"),
            "bias1": P(first.bias.detach(), "head"),
            "weight2": P(torch.zeros(len(last["weight"].value), inner), "head"),
            "bias2": last["bias"],
        }

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        width, inner = self._width(site)
        return 2 * width + inner * (width + 1) + (self.outputs or 0) * (inner + 1)

    def read_out(self, t: Any, z: Tensor) -> Tensor:
        z = F.layer_norm(z, z.shape[-1:], t.gain, t.shift)
        return F.linear(F.gelu(F.linear(z, t.weight1, t.bias1)), t.weight2, t.bias2)
