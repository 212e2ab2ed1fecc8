"""s' = MLP(Attention(s)): the backbone's own block at another width, as equations over tensors of a delta."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .side_context import Context

__all__ = ["Shape", "normed", "side_block"]


@dataclass(frozen=True)
class Shape:
    """What a block is made of: its sizes, where its norms stand, and which of its maps have biases.

    groups  heads of keys and values; `heads` is a multiple of it; size: width of one head
    post    norms stand behind the residual sums (BERT) instead of before the sub-layers
    centred LayerNorm instead of RMSNorm
    biased  those of query, key, value, output, gate, up, down and norm that have one
    """

    width: int
    heads: int
    groups: int
    size: int
    inner: int
    gated: bool
    function: str
    post: bool
    centred: bool
    eps: float
    biased: tuple[str, ...] = ()

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every map."""
        q, kv = self.heads * self.size, self.groups * self.size
        found = {"query": (q, self.width), "key": (kv, self.width), "value": (kv, self.width)}
        found |= {"output": (self.width, q), "up": (self.inner, self.width), "down": (self.width, self.inner)}
        return found | ({"gate": (self.inner, self.width)} if self.gated else {})

    @property
    def scalars(self) -> int:
        """Trainable numbers of the block."""
        maps = sum(o * i + (o if role in self.biased else 0) for role, (o, i) in self.sizes.items())
        return maps + 2 * self.width * (2 if "norm" in self.biased else 1)


@cache
def _function(name: str) -> Callable[[Tensor], Tensor]:
    from transformers.activations import ACT2FN

    return ACT2FN[name]  # type: ignore[no-any-return]


def normed(s: Tensor, weight: Tensor, bias: Tensor | None, centred: bool, eps: float) -> Tensor:
    """LayerNorm (centred) or RMSNorm of the last axis."""
    if centred:
        return F.layer_norm(s, s.shape[-1:], weight, bias, eps)
    return F.rms_norm(s, s.shape[-1:], weight, eps)


def side_block(t: Any, i: int, shape: Shape, s: Tensor, context: Context) -> Tensor:
    """Block i of a side network, its tensors read as `t.query0`, `t.query0_bias`, `t.norm0_1`, ..."""

    def linear(role: str, x: Tensor) -> Tensor:
        bias = getattr(t, f"{role}{i}_bias") if role in shape.biased else None
        return F.linear(x, getattr(t, f"{role}{i}"), bias)

    def norm(n: int, x: Tensor) -> Tensor:
        bias = getattr(t, f"norm{i}_{n}_bias") if "norm" in shape.biased else None
        return normed(x, getattr(t, f"norm{i}_{n}"), bias, shape.centred, shape.eps)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, shape.size)).transpose(1, 2)

    def attention(x: Tensor) -> Tensor:
        q, k = (context.rotate(heads(linear(role, x))) for role in ("query", "key"))
        found = context.attend(q, k, heads(linear("value", x)))
        return linear("output", found.transpose(1, 2).flatten(2))

    def mlp(x: Tensor) -> Tensor:
        function = _function(shape.function)
        up = linear("up", x)
        return linear("down", function(linear("gate", x)) * up if shape.gated else function(up))

    if shape.post:
        s = norm(0, s + attention(s))
        return norm(1, s + mlp(s))
    s = s + attention(norm(0, s))
    return s + mlp(norm(1, s))
