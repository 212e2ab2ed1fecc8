"""h' = h + s W_up f(W_down h): bottleneck adapters in series and in parallel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor

from tunewise.core.delta import Delta, P
from tunewise.sites import Site

__all__ = ["InputAdapter", "ParallelAdapter", "SeriesAdapter"]

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu": F.silu,
    "identity": lambda h: h,
}


class _Bottleneck(Delta):
    """Ad(h) = s W_up f(W_down drop(h) + b_down) + b_up, with W_down `[size, in]`, W_up `[out, size]` starting
    at 0.
    """

    kinds: ClassVar[tuple[str, ...]] = ("attention", "mlp", "linear")
    unit: ClassVar[str] = "row"
    reads: ClassVar[str] = "out"
    size: PositiveInt = 16
    scale: float = 1.0
    function: Literal["relu", "tanh", "gelu", "silu", "identity"] = "relu"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    bias: bool = True
    sites: str | list[str] = "mlp"

    def _ends(self, site: Site) -> tuple[int, int]:
        ins, outs = site.in_features, site.out_features
        assert ins is not None and outs is not None
        return {"in": (ins, ins), "out": (outs, outs), "both": (ins, outs)}[self.reads]

    def tensors(self, site: Site) -> dict[str, P]:
        ins, outs = self._ends(site)
        bound = ins**-0.5
        found = {
            "down": P(torch.empty(self.size, ins).uniform_(-bound, bound), "direction", 0),
            "up": P(torch.zeros(outs, self.size), "direction", 1),
        }
        if self.bias:
            found |= {
                "down_bias": P(torch.zeros(self.size), "bias", 0),
                "up_bias": P(torch.zeros(outs), "bias"),
            }
        return found

    def adapt(self, t: Any, h: Tensor) -> Tensor:
        """Ad(h)."""
        if self.dropout:
            h = F.dropout(h, self.dropout, t.training)
        low = FUNCTIONS[self.function](F.linear(h, t.down, t.down_bias if self.bias else None))
        return self.scale * F.linear(low, t.up, t.up_bias if self.bias else None)

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        ins, outs = self._ends(site)
        return self.size * (ins + outs) + ((self.size + outs) if self.bias else 0)


class SeriesAdapter(_Bottleneck):
    """y' = y + Ad(y), after the sub-layer and before its residual is added.

    Trainable scalars: 2 size out, and size + out biases. Source: Houlsby, arXiv 1902.00751 (W_up starts at 0
    here, so that step 0 is the base model exactly; the paper starts near it).
    """

    reads: ClassVar[str] = "out"

    def output(self, t: Any, x: Tensor, y: Tensor) -> Tensor:
        return y + self.adapt(t, y)


class ParallelAdapter(_Bottleneck):
    """y' = y + Ad(x), beside the sub-layer. Source: scaled parallel adapter, arXiv 2110.04366 (s is `scale`)."""

    reads: ClassVar[str] = "both"

    def output(self, t: Any, x: Tensor, y: Tensor) -> Tensor:
        return y + self.adapt(t, x.to(y.dtype))


class InputAdapter(_Bottleneck):
    """y' = f(x + Ad(x)), before a linear layer. Source: LLM-Adapters' series form, arXiv 2304.01933."""

    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    reads: ClassVar[str] = "in"
    sites: str | list[str] = "up | gate"

    def input(self, t: Any, x: Tensor) -> Tensor:
        return x + self.adapt(t, x)
