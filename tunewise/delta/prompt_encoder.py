"""P = MLP(LSTM(E)) or MLP(E): a soft prompt that a small network makes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from tunewise.core.delta import P
from tunewise.sites import Site

from .prompt import Folded, SoftPrompt, token_table

__all__ = ["EncodedPrompt"]

GATES = 4


class EncodedPrompt(SoftPrompt):
    """f([P; E(x)]), P = W_2 relu(W_1 LSTM(E_P)) or W_3 relu(W_2 relu(W_1 E_P)), E_P `[tokens, width]` trained too.

    network  "lstm": `layers` of both directions, each `hidden` wide, then two linear layers; "mlp": three
    hidden   width of the network; half of the model's for the LSTM, the model's for the MLP unless given
    dropout  between the layers of the LSTM, in training
    The network is there for training alone: `fold` gives the constants P, which exports and PEFT keep. Where the
    prompt stands and how it starts is SoftPrompt's (E_P at embeddings of tokens; the paper draws it at random).
    Source: P-tuning, arXiv 2103.10385; the shapes are those of PEFT.
    """

    network: Literal["lstm", "mlp"] = "lstm"
    hidden: PositiveInt | None = None
    layers: PositiveInt = 2
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def _sizes(self, width: int) -> tuple[int, list[tuple[int, int]]]:
        """The LSTM's width, and (in, out) of the linear layers."""
        h = self.hidden or (max(width // 2, 1) if self.network == "lstm" else width)
        if self.network == "lstm":
            return h, [(2 * h, 2 * h), (2 * h, width)]
        return h, [(width, h), (h, h), (h, width)]

    def _lstm_shapes(self, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes in the order in which torch's LSTM takes them."""
        h, _ = self._sizes(width)
        for layer in range(self.layers):
            for way in ("", "_back"):
                ins = 2 * h if layer else width
                yield f"x{layer}{way}", (GATES * h, ins)
                yield f"h{layer}{way}", (GATES * h, h)
                yield f"bx{layer}{way}", (GATES * h,)
                yield f"bh{layer}{way}", (GATES * h,)

    def tensors(self, site: Site) -> dict[str, P]:
        start = self.start(site)
        width = start.shape[1]
        h, linears = self._sizes(width)
        found = {"E": P(start, "prompt", 0)}
        for name, shape in self._lstm_shapes(width) if self.network == "lstm" else ():
            found[name] = P(torch.empty(shape).uniform_(-(h**-0.5), h**-0.5), _tag(shape))
        for i, (ins, outs) in enumerate(linears):
            bound = ins**-0.5
            found[f"W{i}"] = P(torch.empty(outs, ins).uniform_(-bound, bound), "weight")
            found[f"b{i}"] = P(torch.empty(outs).uniform_(-bound, bound), "bias")
        return found

    def prompt(self, t: Any, rows: int, kwargs: dict[str, Any]) -> Tensor:
        return self.made(t)

    def made(self, t: Any) -> Tensor:
        """P `[tokens, width]`, what the network makes of E_P."""
        x = t.E
        if self.network == "lstm":
            weights = [getattr(t, name) for name, _ in self._lstm_shapes(x.shape[1])]
            zero = x.new_zeros(2 * self.layers, 1, weights[1].shape[1])
            drop = self.dropout if t.training else 0.0
            x = torch.lstm(x[None], (zero, zero), weights, True, self.layers, drop, t.training, True, True)[
                0
            ][0]
        last = len(self._sizes(t.E.shape[1])[1]) - 1
        for i in range(last + 1):
            x = F.linear(x, getattr(t, f"W{i}"), getattr(t, f"b{i}"))
            x = F.relu(x) if i < last else x
        return x

    def folded(self, entries: Sequence[tuple[Site, Any]], model: nn.Module) -> Folded:
        """The same prompt as constants: a SoftPrompt and its P."""
        ((site, t),) = entries
        return SoftPrompt(self.tokens, self.keep, self.place), {site.name: {"P": self.made(t)}}

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        width = token_table(site, type(self).__name__).shape[1]
        h, linears = self._sizes(width)
        lstm = 0
        if self.network == "lstm":
            lstm = 2 * GATES * h * (width + h + 2 + (self.layers - 1) * (3 * h + 2))
        return self.tokens * width + lstm + sum((ins + 1) * outs for ins, outs in linears)


def _tag(shape: tuple[int, ...]) -> str:
    return "weight" if len(shape) == 2 else "bias"
