"""W' = diag(m / |V|) V with V = W + s B A: magnitude and direction of every output, trained apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor

from tunewise.core.delta import Delta, P, SiteDelta
from tunewise.core.errors import UserError
from tunewise.init.base import site_weight
from tunewise.sites import Site

from .dropout import drop
from .kernels import low_rank_linear
from .lora import LoRA

__all__ = ["DoRA"]

TINY = 1e-12
"""Of a squared norm: rows of zeros stay rows of zeros."""


class DoRA(Delta):
    """W' = diag(m / |V|) V, V = W + s B A, |V| the norms of V's rows, which the gradient takes as constants.

    A `[rank, in]` and B `[out, rank]` start as LoRA's, m `[out]` at the norms of W's rows, so that W' = W at
    step 0. One magnitude per output row, as in the authors' code and PEFT; of an embedding table, per
    dimension. With dropout y = m / |V| (W x + s B A drop(x)) + b; the authors' code and PEFT drop in
    (m / |V| - 1) W x as well, which has the same mean and costs a second product. Norms are float32 and come
    from |V_i|^2 = |W_i|^2 + 2 s (W A^T)_i B_i + s^2 B_i A A^T B_i, |W_i|^2 being known, so that V is not formed
    for them. Trainable scalars: rank (in + out) + out per site. Source: arXiv 2402.09353 (constants: 4.3).
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "experts", "embedding")
    gives: ClassVar[frozenset[str]] = frozenset({"sizes"})
    alone: ClassVar[bool] = True
    rank: PositiveInt = 8
    alpha: float = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    scaling: Literal["rank", "sqrt"] = "rank"
    sites: str | list[str] = "linear"

    @property
    def s(self) -> float:
        """The factor of B A."""
        return self.alpha / (self.rank if self.scaling == "rank" else self.rank**0.5)

    def tensors(self, site: Site) -> dict[str, P]:
        if site.kind == "experts" and self.dropout:
            raise UserError(
                f"DoRA has no dropout on the experts {site.name}: set dropout=0 or leave them out."
            )
        norms = site_weight(site).square().sum(-1).sqrt()
        return LoRA(self.rank).tensors(site) | {"m": P(norms, "magnitude")}

    def weight(self, t: Any, W: Tensor) -> Tensor:
        if self.dropout and t.training and torch.is_grad_enabled():
            raise UserError(
                f"DoRA with dropout at {t.site_name} cannot be trained beside other deltas of the same weight: "
                "set dropout=0."
            )
        V = W + self.s * (t.B @ t.A)
        wide = torch.promote_types(V.dtype, torch.float32)
        norms = torch.linalg.vector_norm(V.detach(), dim=-1, dtype=wide).clamp(min=TINY**0.5)
        return V * (t.m.to(wide) / norms)[..., None].to(V.dtype)

    def output(self, t: Any, x: Tensor, y: Tensor) -> Tensor:
        own: SiteDelta = t.cast(t.dtype)
        d, b = self._scale(own), None
        if t.kind == "embedding":
            low = F.linear(F.embedding(x, t.A.T), t.B)
        else:
            low = F.linear(F.linear(drop(x, self.dropout, t.training).to(t.A.dtype), t.A), t.B)
            b = getattr(own.root, "bias", None)
            b = b if b is None or own.rows is None else b.index_select(0, own.rows)
        return y + ((y if b is None else y - b) * (d - 1) + self.s * low * d).to(y.dtype)

    def product(self, t: Any, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        trained = W.requires_grad or (b is not None and b.requires_grad)
        if trained or torch.compiler.is_compiling():  # the fused function gives W and b no gradient
            y = F.linear(x, W, b)
            return self.output(t.cast(y.dtype), x, y)
        p = self.dropout if t.training else 0.0
        return low_rank_linear(x, W, b, t.A, t.B, self.s, p, self._scale(t))

    def _scale(self, t: SiteDelta) -> Tensor:
        """m / |V|, `[out]`, in float32 or wider."""
        m, A, B = (t.get_parameter(name) for name in ("m", "A", "B"))
        with torch.no_grad(), torch.autocast(m.device.type, enabled=False):
            W = site_weight(t)
            a, b = A.to(W.dtype), B.to(W.dtype)
            squares = _squares(t, W) + 2 * self.s * ((W @ a.T) * b).sum(-1)
            squares = squares + self.s**2 * ((b @ (a @ a.T)) * b).sum(-1)
            norms = squares.clamp(min=TINY).sqrt()
        return m.to(norms.dtype) / norms

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        into, out = site.in_features or 0, site.out_features or 0
        return (self.rank * (into + out) + out) * site.count


def _squares(t: SiteDelta, W: Tensor) -> Tensor:
    """|W_i|^2 of every row, computed again when the base's weight is another or was written."""
    if torch.compiler.is_compiling():
        return W.square().sum(-1)
    stored = getattr(t.root, t.parameter)
    mark = (stored.dtype, stored.device, None if stored.is_inference() else stored._version)
    known: Any = t.__dict__.get("squares")
    if known is None or known[0] is not stored or known[1] != mark:
        known = t.__dict__["squares"] = (stored, mark, W.square().sum(-1))
    squares: Tensor = known[2]
    return squares
