"""W' = W + s B A: low-rank adaptation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor

from tunewise.core.delta import Delta, P
from tunewise.sites import Site

from .kernels import drop, low_rank_linear

__all__ = ["LoRA"]


class LoRA(Delta):
    """W' = W + s B A, with A `[rank, in]`, B `[out, rank]`, s = alpha / rank (or alpha / sqrt(rank)).

    A starts uniform in (-1/sqrt(in), 1/sqrt(in)), B at 0, so that W' = W at step 0. With dropout the low-rank
    path sees drop(x), the base x; embeddings have none. On 3-D experts A and B have one more, leading
    dimension. Trainable scalars: rank (in + out) per site. Source: LoRA, arXiv 2106.09685; sqrt scaling:
    rsLoRA, arXiv 2312.03732.
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "experts", "embedding")
    gives: ClassVar[frozenset[str]] = frozenset({"components", "sizes", "quantized"})
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
        assert site.in_features is not None and site.out_features is not None
        lead = (site.count,) if site.kind == "experts" else ()
        bound = site.in_features**-0.5
        a = torch.empty(*lead, self.rank, site.in_features).uniform_(-bound, bound)
        b = torch.zeros(*lead, site.out_features, self.rank)
        return {"A": P(a, "direction", len(lead)), "B": P(b, "direction", len(lead) + 1)}

    def weight(self, t: Any, W: Tensor) -> Tensor:
        return W + self.s * (t.B @ t.A)

    def output(self, t: Any, x: Tensor, y: Tensor) -> Tensor:
        if t.kind == "embedding":
            return y + self.s * F.linear(F.embedding(x, t.A.T), t.B)
        h = drop(x, self.dropout, t.training).to(t.A.dtype)
        return y + self.s * F.linear(F.linear(h, t.A), t.B)

    def product(self, t: Any, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        trained = W.requires_grad or (b is not None and b.requires_grad)
        if trained or torch.compiler.is_compiling():  # the fused function gives W and b no gradient
            y = F.linear(x, W, b)
            return self.output(t.cast(y.dtype), x, y)
        return low_rank_linear(x, W, b, t.A, t.B, self.s, self.dropout if t.training else 0.0)

    def components(self, t: Any) -> tuple[Tensor, Tensor]:
        """(s B, A): their product is W' - W."""
        return self.s * t.B, t.A

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        return self.rank * ((site.in_features or 0) + (site.out_features or 0)) * site.count
