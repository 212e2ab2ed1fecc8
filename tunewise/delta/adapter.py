"""h' = h + s W_up f(W_down h): bottleneck adapters in series and in parallel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor

from tunewise.core.delta import Delta, P
from tunewise.sites import Site

__all__ = ["Bottleneck", "InputAdapter", "ParallelAdapter", "SeriesAdapter", "Weights", "ends"]

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "identity": lambda h: h,
}
Function = Literal["relu", "tanh", "gelu", "gelu_new", "silu", "identity"]


class Weights(NamedTuple):
    """What one adapter computes with; `before` and `after` are (gain, shift) of a norm of its input or output."""

    down: Tensor
    up: Tensor
    down_bias: Tensor | None = None
    up_bias: Tensor | None = None
    before: tuple[Tensor, Tensor] | None = None
    after: tuple[Tensor, Tensor] | None = None


def ends(site: Site, reads: str) -> tuple[int, int]:
    """(in, out) of an adapter that stands before a site ("in"), behind it ("out") or beside it ("both")."""
    ins, outs = site.in_features, site.out_features
    assert ins is not None and outs is not None
    return {"in": (ins, ins), "out": (outs, outs), "both": (ins, outs)}[reads]


class Bottleneck(Delta):
    """Ad(h) = s LN(W_up f(W_down LN(drop(h)) + b_down) + b_up), both norms optional, with W_down `[size, in]`,
    W_up `[out, size]`.

    What the weights are is up to `weights`: trained ones, sums of Kronecker products, generated ones. `scale` is s;
    "learned" makes it one trained scalar per site that starts at 1.
    """

    kinds: ClassVar[tuple[str, ...]] = ("attention", "mlp", "linear")
    unit: ClassVar[str] = "row"
    reads: ClassVar[str] = "out"
    size: PositiveInt = 16
    scale: float | Literal["learned"] = 1.0
    function: Function = "relu"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    sites: str | list[str] = "mlp"

    def factor(self) -> dict[str, P]:
        """The learned scalar, where there is one."""
        return {"factor": P(torch.ones(1), "scale")} if self.scale == "learned" else {}

    def weights(self, t: Any) -> Weights:
        """What is computed with now, in the dtype of `t`."""
        raise NotImplementedError

    def adapt(self, t: Any, h: Tensor) -> Tensor:
        """Ad(h)."""
        w = self.weights(t)
        if self.dropout:
            h = F.dropout(h, self.dropout, t.training)
        if w.before is not None:
            h = F.layer_norm(h, h.shape[-1:], *w.before)
        y = F.linear(FUNCTIONS[self.function](F.linear(h, w.down, w.down_bias)), w.up, w.up_bias)
        if w.after is not None:
            y = F.layer_norm(y, y.shape[-1:], *w.after)
        return (t.factor if self.scale == "learned" else self.scale) * y


class _Trained(Bottleneck):
    """Ad(h) with weights of its own: W_down starts uniform in +-1/sqrt(in), W_up at 0, biases at 0.

    start="bert" draws both from N(0, 0.02), so that step 0 is only near the base; `norm` adds a LayerNorm "before"
    W_down or "after" W_up. With function="identity" and no norm the adapter is a linear map: at linear sites it can
    be merged, exactly. Trainable scalars: size (in + out), with biases size + out more, with a norm twice its width.
    """

    bias: bool = True
    norm: Literal["none", "before", "after"] = "none"
    start: Literal["zero", "bert"] = "zero"

    @property
    def identity(self) -> bool:  # type: ignore[override]
        """Whether step 0 is the base."""
        return self.start == "zero"

    @property
    def linear(self) -> bool:  # type: ignore[override]
        """Whether the adapter is an affine map."""
        return self.function == "identity" and self.norm == "none"

    def tensors(self, site: Site) -> dict[str, P]:
        ins, outs = ends(site, self.reads)
        down, up = torch.empty(self.size, ins), torch.zeros(outs, self.size)
        if self.start == "bert":
            down, up = down.normal_(std=0.02), up.normal_(std=0.02)
        else:
            down = down.uniform_(-(ins**-0.5), ins**-0.5)
        found = {"down": P(down, "direction", 0), "up": P(up, "direction", 1)}
        if self.bias:
            found |= {
                "down_bias": P(torch.zeros(self.size), "bias", 0),
                "up_bias": P(torch.zeros(outs), "bias"),
            }
        if self.norm != "none":
            width = ins if self.norm == "before" else outs
            found |= {"gain": P(torch.ones(width), "scale"), "shift": P(torch.zeros(width), "bias")}
        return found | self.factor()

    def weights(self, t: Any) -> Weights:
        before, after = ((t.gain, t.shift) if self.norm == where else None for where in ("before", "after"))
        low, high = (t.down_bias, t.up_bias) if self.bias else (None, None)
        return Weights(t.down, t.up, low, high, before, after)

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        ins, outs = ends(site, self.reads)
        norm = {"none": 0, "before": 2 * ins, "after": 2 * outs}[self.norm]
        biases = self.size + outs if self.bias else 0
        return self.size * (ins + outs) + biases + norm + (self.scale == "learned")


class SeriesAdapter(_Trained):
    """y' = y + Ad(y), after the sub-layer and before its residual is added.

    AdapterHub calls this `double_seq_bn` at "attention | mlp" and `seq_bn` at "mlp". Trainable scalars: 2 size out,
    and size + out biases. Source: Houlsby, arXiv 1902.00751 (W_up starts at 0 here, so that step 0 is the base model
    exactly; the paper starts near it).
    """

    reads: ClassVar[str] = "out"

    def output(self, t: Any, x: Tensor, y: Tensor) -> Tensor:
        return y + self.adapt(t, y)


class ParallelAdapter(_Trained):
    """y' = y + Ad(x), beside the sub-layer or layer (AdapterHub: `par_bn`).

    Source: (scaled) parallel adapter, arXiv 2110.04366 (s is `scale`).
    """

    reads: ClassVar[str] = "both"

    def output(self, t: Any, x: Tensor, y: Tensor) -> Tensor:
        return y + self.adapt(t, x.to(y.dtype))


class InputAdapter(_Trained):
    """y' = W (x + Ad(x)) + b, before a linear layer. Source: LLM-Adapters' series form, arXiv 2304.01933."""

    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    reads: ClassVar[str] = "in"
    sites: str | list[str] = "mlp & ~down"

    def input(self, t: Any, x: Tensor) -> Tensor:
        return x + self.adapt(t, x)
