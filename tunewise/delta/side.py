"""s_i = block_i(mu_i s_{i-1} + (1 - mu_i) D_i h_i): a ladder beside a frozen backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from tunewise.core.delta import Delta, P
from tunewise.core.errors import UserError
from tunewise.sites import Site

__all__ = ["Ladder"]


class Ladder(Delta):
    """y' = y + Up(s_L), s_i = s + W2_i gelu(W1_i norm(s)), s = mu_i s_{i-1} + (1 - mu_i) D_i h_i, mu_i =
    sigmoid(a_i / T).

    h_i `[batch, length, width]` are detached block outputs, D_i `[width / reduction, width]`, a_i start at 0
    (mu = 0.5), T = 0.1. The backbone gets no backward pass below the last block. Simpler than Ladder
    Side-Tuning (arXiv 2206.06522): the side blocks are feed-forward without attention and start at random
    instead of from pruned backbone weights; Up starts at 0 and is added to the last block's output, so step 0
    is the base model.
    """

    kinds: ClassVar[tuple[str, ...]] = ("block",)
    gives: ClassVar[frozenset[str]] = frozenset({"frozen_backbone"})
    taps: ClassVar[str | None] = "block"
    reduction: PositiveInt = 8
    temperature: float = 0.1
    sites: str | list[str] = "layers[-1]"

    def side_tensors(self, site: Site, taps: Sequence[Site]) -> dict[str, P]:
        width = site.out_features
        if width is None or any(tap.out_features is None for tap in taps):
            raise UserError(f"The width of {site.name} is not known, so a ladder cannot be sized.")
        d, found = max(width // self.reduction, 1), {}
        for i, tap in enumerate(taps):
            bound = (tap.out_features or 1) ** -0.5
            found[f"D{i}"] = P(torch.empty(d, tap.out_features or 1).uniform_(-bound, bound), "direction")
            found[f"W1_{i}"] = P(torch.empty(2 * d, d).uniform_(-(d**-0.5), d**-0.5), "weight")
            found[f"W2_{i}"] = P(torch.zeros(d, 2 * d), "weight")
        if len(taps) > 1:  # the first tap has nothing before it to be mixed with
            found["a"] = P(torch.zeros(len(taps) - 1), "gate")
        found["up"] = P(torch.zeros(width, d), "direction")
        return found

    def read(self, t: Any, taps: list[Tensor], y: Tensor) -> Tensor:
        mu = torch.sigmoid(t.a / self.temperature) if len(taps) > 1 else None
        s: Tensor | None = None
        for i, h in enumerate(taps):
            low = F.linear(h.to(y.dtype), getattr(t, f"D{i}"))
            s = low if s is None or mu is None else mu[i - 1] * s + (1 - mu[i - 1]) * low
            s = s + F.linear(
                F.gelu(F.linear(F.layer_norm(s, s.shape[-1:]), getattr(t, f"W1_{i}"))), getattr(t, f"W2_{i}")
            )
        assert s is not None
        return y + F.linear(s, t.up)

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        d = max((site.out_features or 0) // self.reduction, 1)
        return (
            sum(d * (tap.out_features or 0) + 4 * d * d + 1 for tap in taps)
            - 1
            + d * (site.out_features or 0)
        )
