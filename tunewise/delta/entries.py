"""W' = W + scatter(values): single entries of a weight are trained, whichever a selector picks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tunewise.core.delta import Delta, P
from tunewise.core.errors import RunError, UserError
from tunewise.core.streams import seed_of
from tunewise.init.base import site_weight
from tunewise.sites import Site

from .select_entries import Entries, Uniform

__all__ = ["FewEntries", "SparseEntries", "SparseLinear", "smallest"]


class SparseEntries(Delta):
    """W' = W + scale scatter(values, index), values `[k]` starting at 0, index `[k]` into the flattened W.

    What is trained is the change and not the entry itself, so that step 0 is the base bit by bit, small changes
    keep their precision and other deltas may act on the same weight; weight decay then pulls to the pretrained
    value instead of to 0. All of an optimizer's state is of length k: this is the sparse-aware AdamW of SaRA,
    LIFT, random masking and DSEE in one mechanism, and decay touches selected entries alone.

    The gradient of W exists for one layer at a time, and only its selected entries are kept. `entries` picks once,
    when the delta is attached; on 3-D experts from each of them. The index is saved with the values.
    Trainable scalars: k per site. Raises `UserError` where nothing is selected.
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "embedding", "experts")
    unit: ClassVar[str] = "entry"
    entries: Entries = Uniform(share=0.01)
    scale: float = 1.0
    seed: int = 0
    sites: str | list[str] = "linear"

    def choice(self, W: Tensor, site: Site, when: int = 0) -> Tensor:
        """The selected entries of W `[..., out, in]`, sorted positions in the flattened W."""
        make = torch.Generator().manual_seed(seed_of(self.seed, "entries", site.name, when))
        if W.dim() == 2:
            return self.entries.pick(W, make)
        found = [self.entries.pick(one, make) + i * one.numel() for i, one in enumerate(W)]
        return torch.cat(found)

    def tensors(self, site: Site) -> dict[str, P]:
        W = site_weight(site)
        index = self.choice(W, site).to(smallest(W))
        return {"values": P(torch.zeros(len(index)), "weight", 0), "index": P(index, "mask", trainable=False)}

    def attached(self, adaptation: Any) -> None:
        mine = [len(t.index) for _, _, t in adaptation.sites if t.part is self]
        if not sum(mine):
            raise UserError(f"{self.entries} selects no entry of the {len(mine)} weights at {self.sites!r}.")

    def weight(self, t: Any, W: Tensor) -> Tensor:
        return W.reshape(-1).index_add(0, t.index, self._change(t).to(W.dtype)).view(W.shape)

    def product(self, t: Any, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        if W.requires_grad or torch.compiler.is_compiling():
            return F.linear(x, self.weight(t, W.to(t.dtype)).to(W.dtype), b)
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            x, b = x.to(dtype), None if b is None else b.to(dtype)
        return SparseLinear.apply(x, W, b, self._change(t), t.index)  # type: ignore[no-any-return,no-untyped-call]

    def _change(self, t: Any) -> Tensor:
        return t.values if self.scale == 1.0 else self.scale * t.values  # type: ignore[no-any-return]

    def selected(self, t: Any, W: Tensor) -> Tensor:
        """Zeros, and W' at the selected entries."""
        flat = W.reshape(-1)
        learnt = flat.index_select(0, t.index) + self._change(t).to(W.dtype)
        return torch.zeros_like(flat).index_add(0, t.index, learnt).view(W.shape)

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        W = site_weight(site)
        return sum(self.entries.count(one) for one in (W if W.dim() == 3 else (W,)))


class FewEntries(SparseEntries):
    """y' = y + scale sum_i values_i x[column_i] e[row_i]: the same change for so few entries that W' is not worth
    building.

    Costs k products per token instead of a pass over the weight; linear layers only.
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear",)

    def output(self, t: Any, x: Tensor, y: Tensor) -> Tensor:
        index = t.index.long()
        rows, columns = index // x.shape[-1], index % x.shape[-1]
        return y.index_add(-1, rows, x.index_select(-1, columns).to(y.dtype) * self._change(t).to(y.dtype))

    def fusable(self, t: Any) -> bool:
        return False


def smallest(W: Tensor) -> torch.dtype:
    """The integer type that holds every position of W."""
    return torch.int32 if W.numel() <= torch.iinfo(torch.int32).max else torch.int64


def _changed(W: Tensor, change: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """W' in one copy of W; the sum is rounded once, as the eager form does it."""
    new = W.clone(memory_format=torch.contiguous_format)
    where = index.long()
    flat = new.view(-1)
    flat.index_copy_(0, where, (flat.index_select(0, where).to(change.dtype) + change).to(W.dtype))
    return new.to(dtype)


class SparseLinear(torch.autograd.Function):
    """y = W' x + b that keeps x and no W'; the backward pass builds W' anew and gathers dW at the index.

    x `[..., in]`, W `[out, in]` frozen, change and index `[k]`. Once differentiable: asking for more raises.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, change: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(x, W, change, index)
        return F.linear(x, _changed(W, change, index, x.dtype), b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RunError(
                "The fused sparse product has no second derivative: attach with plain=True, or declare that "
                'the part needs "second_order".'
            )
        x, W, change, index = ctx.saved_tensors
        g, flat = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_x = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = (g @ _changed(W, change, index, x.dtype)).view(x.shape)
        if ctx.needs_input_grad[2]:
            grad_b = g.sum(0)
        grad_change = (g.T @ flat).view(-1).index_select(0, index).to(change.dtype)
        return grad_x, None, grad_b, grad_change, None
