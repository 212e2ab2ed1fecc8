"""W' = W + s B A: low-rank adaptation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor

from tunewise.core.delta import Delta, P
from tunewise.core.errors import UserError
from tunewise.init.base import Init, start_from_weights, start_tensors
from tunewise.sites import Site

from .kernels import drop, low_rank_linear

if TYPE_CHECKING:
    from tunewise.core.adaptation import Adaptation

__all__ = ["LoRA"]


class LoRA(Delta):
    """W' = W + s B A, with A `[rank, in]`, B `[out, rank]`, s = alpha / rank (or alpha / sqrt(rank)).

    A starts uniform in (-1/sqrt(in), 1/sqrt(in)), B at 0, so that W' = W at step 0; `init` is another start:
    SVD(), QR(), EVA(), CorDA(), FromDelta(path). One that begins inside W takes its start away again, W' = W +
    s (B A - B_0 A_0), with B_0 and A_0 frozen. With dropout the trained path sees drop(x), all else x;
    embeddings have none. On 3-D experts A and B have one more, leading dimension, and dropout is refused.
    Trainable scalars: rank (in + out) per site. Source: LoRA, arXiv 2106.09685; sqrt scaling: rsLoRA, arXiv
    2312.03732.
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "experts", "embedding")
    gives: ClassVar[frozenset[str]] = frozenset({"components", "sizes"})
    rank: PositiveInt = 8
    alpha: float = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    scaling: Literal["rank", "sqrt"] = "rank"
    sites: str | list[str] = "linear"
    init: Init | None = None

    @property
    def s(self) -> float:
        """The factor of B A."""
        return self.alpha / (self.rank if self.scaling == "rank" else self.rank**0.5)

    @property
    def identity(self) -> bool:  # type: ignore[override]
        """Whether W' = W at step 0."""
        return self.init is None or self.init.identity

    @property
    def residual(self) -> bool:
        """Whether B_0 A_0 stands beside B A."""
        return self.init is not None and self.init.residual

    def tensors(self, site: Site) -> dict[str, P]:
        if site.kind == "experts" and self.dropout:
            raise UserError(
                f"{type(self).__name__} has no dropout on the experts {site.name}: set dropout=0 or leave them out."
            )
        assert site.in_features is not None and site.out_features is not None
        lead = (site.count,) if site.kind == "experts" else ()
        bound = site.in_features**-0.5
        a = torch.empty(*lead, self.rank, site.in_features).uniform_(-bound, bound)
        b = torch.zeros(*lead, site.out_features, self.rank)
        trained = {"A": P(a, "direction", len(lead)), "B": P(b, "direction", len(lead) + 1)}
        return trained | start_tensors(self.init, a, b)

    def attached(self, adaptation: Adaptation) -> None:
        start_from_weights(self, adaptation)

    def trained(self, t: Any) -> tuple[Tensor, Tensor]:
        """(A, B) with gradients."""
        return t.A, t.B

    def stacked(self, t: Any) -> tuple[Tensor, Tensor]:
        """(A, B) of all of W' - W = s B A; with a start inside W, of twice the rank.

        B A - B_0 A_0 = (B - B_0) A + B_0 (A - A_0): exactly 0 at step 0, and as precise as the change is small.
        """
        a, b = self.trained(t)
        return (torch.cat([a, a - t.A0], -2), torch.cat([b - t.B0, t.B0], -1)) if self.residual else (a, b)

    def weight(self, t: Any, W: Tensor) -> Tensor:
        a, b = self.stacked(t)
        return W + self.s * (b @ a)

    def output(self, t: Any, x: Tensor, y: Tensor) -> Tensor:
        a, b = self.stacked(t)
        if t.kind == "embedding":
            return y + self.s * F.linear(F.embedding(x, a.T), b)
        if self.dropout and t.training and self.residual:
            a, b = self.trained(t)
            y = y - self.s * F.linear(F.linear(x.to(a.dtype), t.A0), t.B0)
        return y + self.s * F.linear(F.linear(drop(x, self.dropout, t.training).to(a.dtype), a), b)

    def product(self, t: Any, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        p = self.dropout if t.training else 0.0
        trained = W.requires_grad or (b is not None and b.requires_grad)
        # the fused function gives W and b no gradient, and drops all of its low-rank path or nothing
        if trained or torch.compiler.is_compiling() or (p and self.residual):
            y = F.linear(x, W, b)
            return self.output(t.cast(y.dtype), x, y)
        down, up = self.stacked(t)
        return low_rank_linear(x, W, b, down, up, self.s, p) if len(down) else F.linear(x, W, b)

    def components(self, t: Any) -> tuple[Tensor, Tensor]:
        """(s B, A): their product is W' - W."""
        a, b = self.stacked(t)
        return self.s * b, a

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        return self.rank * ((site.in_features or 0) + (site.out_features or 0)) * site.count
