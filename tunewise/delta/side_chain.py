"""s_i = block_i(mu_i s_{i-1} + (1 - mu_i) D_i h_i), y' = write(s_L): side transformers, LST and QST."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from tunewise.core.delta import P
from tunewise.core.errors import UserError
from tunewise.sites import Site

from .side import Side, default_linear
from .side_block import Shape, normed, side_block
from .side_context import Context
from .side_start import channels, pruned, pruned_norm, random_start, shape_of, source_of

__all__ = ["Chain", "LadderSide", "QuantizedSide"]


class Chain(Side):
    """s_0 = D_0 h_0, s_i = block_i(mu_i s_{i-1} + (1 - mu_i) D_i h_i), y' = write(norm s_L, y).

    One block for each tap, the backbone's own kind of block at 1/reduction of its width: number of heads, place and
    kind of norms, gated or plain MLP, biases, causal and padding mask and rotary angles are the backbone's; exactly
    so for BERT-, GPT-2-, ViT- and Llama-like blocks. Of others what is special is left out: norms of queries and
    keys, relative and linear biases, sliding windows, parallel residuals, experts (a dense MLP stands for them).
    No dropout. Raises `UserError` for blocks without an attention whose projections are known.
    """

    identity: ClassVar[bool] = False
    reduction: PositiveInt = 8

    def shapes(self, taps: Sequence[Site]) -> list[Shape]:
        """What the side blocks are made of; kept for the forward pass."""
        found = [shape_of(source_of(tap), self.reduction) for tap in taps]
        if len({shape.width for shape in found}) > 1:
            raise UserError(f"{type(self).__name__} reads blocks of one width, and these have several.")
        self.__dict__["made"] = found
        return found

    def network(self, t: Any, h: list[Tensor], y: Tensor, context: Context) -> Tensor:
        s = self.down(t, 0, context.h0)
        for i, tap in enumerate(h):
            mu = self.mix(t, i)
            s = side_block(t, i, self.made[i], mu * s + (1 - mu) * self.down(t, i + 1, tap), context)
        return self.write(t, s, y)

    @property
    def made(self) -> list[Shape]:
        """The shapes that `start` has found."""
        return self.__dict__["made"]  # type: ignore[no-any-return]

    def down(self, t: Any, i: int, h: Tensor) -> Tensor:
        """D_i h; 0 is that of h_0."""
        raise NotImplementedError

    def mix(self, t: Any, i: int) -> Tensor:
        """mu_i."""
        raise NotImplementedError

    def write(self, t: Any, s: Tensor, y: Tensor) -> Tensor:
        """y'."""
        raise NotImplementedError


class LadderSide(Chain):
    """s_0 = D_0 h_0, s_i = block_i(mu_i s_{i-1} + (1 - mu_i) D_i h_i), mu_i = sigmoid(a_i / T), y' = Up norm(s_L).

    h_i `[rows, length, width]`, s_i `[rows, length, width / reduction]`; a_i start at 0, so mu_i = 0.5; T = 0.1. D_i
    and Up are linear layers with biases, their weights uniform with variances 2 / width and reduction / width: the
    mixture of two states and what is written begin as large as a state. Where norms stand behind the residual sums
    (BERT), torch's own start, a sixth and a third of that, lets the taps hardly be heard and learns late. What comes
    behind reads the side network alone: step 0 is not the base. With start="pruned" the blocks and the last norm
    begin as those of the backbone at the channels (one choice for all), head dimensions and hidden units with the
    largest sums of |w|; rotary pairs are evenly spaced, so that they turn as the backbone's do. Where no norm stands
    behind the last block (BERT), none does in the side network. Trainable scalars: those of the blocks and D_i, one
    gate each, D_0, Up and the norm.
    Left out: pruning by Fisher information, dropout, the side decoder's attention to a side encoder. Raises
    `UserError` as `Chain` does. Source: Ladder Side-Tuning, arXiv 2206.06522.
    """

    beginning: Literal["pruned", "random"] = "pruned"
    temperature: PositiveFloat = 0.1

    @property
    def in_place(self) -> bool:
        return True

    def start(self, site: Site, taps: Sequence[Site]) -> dict[str, P]:
        shapes, width = self.shapes(taps), taps[0].out_features or 1
        d = shapes[0].width
        found: dict[str, P] = {}
        kept = channels((source_of(tap) for tap in taps), width, d)
        for i, (tap, shape) in enumerate(zip(taps, shapes, strict=True)):
            known = self.beginning == "pruned"
            found |= pruned(i, source_of(tap), shape, kept) if known else random_start(i, shape)
        for i in range(len(taps) + 1):
            weight, bias = default_linear(d, width, gain=2**0.5)
            found |= {f"D{i}": P(weight, "direction"), f"D{i}_bias": P(bias, "bias")}
        found["a"] = P(torch.zeros(len(taps)), "gate")
        if site.kind == "norm":
            found |= pruned_norm("norm", site.module, kept, "norm" in shapes[-1].biased)
        weight, bias = default_linear(site.out_features or 1, d, gain=1.0)
        return found | {"up": P(weight, "direction"), "up_bias": P(bias, "bias")}

    def down(self, t: Any, i: int, h: Tensor) -> Tensor:
        return F.linear(h, getattr(t, f"D{i}"), getattr(t, f"D{i}_bias"))

    def mix(self, t: Any, i: int) -> Tensor:
        return torch.sigmoid(t.a[i] / self.temperature)

    def write(self, t: Any, s: Tensor, y: Tensor) -> Tensor:
        if t.kind == "norm":
            last = self.made[-1]
            s = normed(s, t.norm, t.norm_bias if "norm" in last.biased else None, last.centred, last.eps)
        return F.linear(s, t.up, t.up_bias)

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        shapes = [shape_of(source_of(tap), self.reduction) for tap in taps]
        d, width, n = shapes[0].width, taps[0].out_features or 0, len(taps)
        norm = (2 if "norm" in shapes[-1].biased else 1) * d if site.kind == "norm" else 0
        up = (site.out_features or 0) * (d + 1)
        return sum(shape.scalars for shape in shapes) + (n + 1) * d * (width + 1) + n + norm + up


class QuantizedSide(Chain):
    """s = D_1 h_0; s <- block_i(m_i s + (1 - m_i) D_i h_i), m_i = sigmoid(z_i); y' = g y + (1 - g) Up norm(s).

    D_i h = LN(B_i silu(A_i h)), A_i `[inner, width]`, B_i `[width / reduction, inner]` without biases; pooling="max"
    and "average" pool neighbouring channels instead and train only the LN. z_i `[width / reduction]` start at 0.5, z
    `[width]` at 1, g = sigmoid(z): y, the backbone's own normed state, begins with a share of 0.73, near the base but
    not it. D of the first block serves h_0 too. Blocks start at random, norm is an RMSNorm. Meant for a backbone in
    4 bits: its weights are read by its own forward pass alone and are never touched. Trainable scalars: with d =
    width / reduction those of the blocks, inner (width + d) + 3 d for each, d, (d + 1) width.
    Left out: the adapter's dropout (off in the reference). Source: QST, arXiv 2401.07159.
    """

    reduction: PositiveInt = 16
    inner: PositiveInt = 16
    pooling: Literal["low_rank", "max", "average"] = "low_rank"

    def start(self, site: Site, taps: Sequence[Site]) -> dict[str, P]:
        shapes, width = self.shapes(taps), taps[0].out_features or 1
        d = shapes[0].width
        found: dict[str, P] = {}
        for i, shape in enumerate(shapes):
            found |= random_start(i, shape)
            if self.pooling == "low_rank":
                found[f"A{i}"] = P(default_linear(self.inner, width, bias=False)[0], "direction")
                found[f"B{i}"] = P(default_linear(d, self.inner, bias=False)[0], "direction")
            found |= {f"gain{i}": P(torch.ones(d), "scale"), f"shift{i}": P(torch.zeros(d), "bias")}
        outs = site.out_features or 1
        found |= {"z": P(torch.full((len(taps), d), 0.5), "gate"), "norm": P(torch.ones(d), "scale")}
        return found | {
            "up": P(default_linear(outs, d, bias=False)[0], "direction"),
            "z_out": P(torch.ones(outs), "gate"),
        }

    def down(self, t: Any, i: int, h: Tensor) -> Tensor:
        i, d = max(i - 1, 0), self.made[0].width
        if self.pooling == "low_rank":
            low = F.linear(F.silu(F.linear(h, getattr(t, f"A{i}"))), getattr(t, f"B{i}"))
        else:
            pool = F.adaptive_max_pool1d if self.pooling == "max" else F.adaptive_avg_pool1d
            low = pool(h, d)
        return F.layer_norm(low, (d,), getattr(t, f"gain{i}"), getattr(t, f"shift{i}"))

    def mix(self, t: Any, i: int) -> Tensor:
        return torch.sigmoid(t.z[i])

    def write(self, t: Any, s: Tensor, y: Tensor) -> Tensor:
        share = torch.sigmoid(t.z_out)
        return share * y + (1 - share) * F.linear(normed(s, t.norm, None, False, 1e-6), t.up)

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        shapes = [shape_of(source_of(tap), self.reduction) for tap in taps]
        d, width, outs = shapes[0].width, taps[0].out_features or 0, site.out_features or 0
        maps = self.inner * (width + d) if self.pooling == "low_rank" else 0
        return sum(shape.scalars + maps + 3 * d for shape in shapes) + d + outs * (d + 1)
