"""y' = y + g W_up f(W_down x): one bottleneck for several blocks, behind a gate that starts shut."""

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

from .prompt_generator import layer_of

__all__ = ["SharedBottleneck"]


class SharedBottleneck(Delta):
    """y' = y + g (W_up f(W_down x + b_down) + b_up), f(z) = z sigmoid(1.702 z), beside the feed-forward sub-layer.

    One set per `every` consecutive blocks; g starts at 0. x is the sub-layer's input: the residual stream where the
    norm comes after it, the normed one where it comes before (DVPT's code reads it before the norm there).
    Trainable scalars: (2 width + 1) size + width + 1 per set. Source: DVPT's code, arXiv 2307.09787.
    """

    kinds: ClassVar[tuple[str, ...]] = ("mlp",)
    unit: ClassVar[str] = "row"
    size: PositiveInt = 20
    every: PositiveInt = 3
    sites: str | list[str] = "mlp"

    def shared(self, sites: Sequence[Site]) -> dict[str, P]:
        found: dict[str, P] = {}
        for group in sorted({layer_of(site.name) // self.every for site in sites}):
            mine = [site for site in sites if layer_of(site.name) // self.every == group]
            shapes = {(site.in_features, site.out_features) for site in mine}
            if len(shapes) != 1 or None in next(iter(shapes)):
                raise UserError(
                    "SharedBottleneck: the sub-layers that share one have no one width that is known."
                )
            ins, outs = next(iter(shapes))
            assert ins is not None and outs is not None
            down = torch.empty(self.size, ins).uniform_(-(ins**-0.5), ins**-0.5)
            up = torch.empty(outs, self.size).uniform_(-(self.size**-0.5), self.size**-0.5)
            found |= {
                f"down_{group}": P(down, "direction", 0),
                f"up_{group}": P(up, "direction", 1),
                f"down_bias_{group}": P(torch.zeros(self.size), "bias", 0),
                f"up_bias_{group}": P(torch.zeros(outs), "bias"),
                f"gate_{group}": P(torch.zeros(1), "gate"),
            }
        return found

    def output(self, t: Any, x: Tensor, y: Tensor) -> Tensor:
        group, w = layer_of(t.site_name) // self.every, t.shared
        low = F.linear(x.to(y.dtype), getattr(w, f"down_{group}"), getattr(w, f"down_bias_{group}"))
        up = F.linear(
            low * torch.sigmoid(1.702 * low), getattr(w, f"up_{group}"), getattr(w, f"up_bias_{group}")
        )
        return y + getattr(w, f"gate_{group}") * up
