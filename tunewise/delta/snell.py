"""W' = W + sparse(c (dist(O1, I1) - dist(O2, I2))): a kernelised low-rank change of which large entries survive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tunewise.core.delta import Delta, P
from tunewise.sites import Site

from .fused import changed_linear

__all__ = ["KernelEntries", "compete", "distances"]


def distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|, `[n, m]` for a `[n, d]` and b `[m, d]`; points that coincide have gradient 0, not NaN."""
    square = a.square().sum(1)[:, None] + b.square().sum(1) - 2.0 * (a @ b.T)
    return square.clamp(min=1e-12).sqrt()


def compete(D: Tensor, sparsity: float, sparsify: str) -> Tensor:
    """The floor(sparsity n) smallest |D| become 0; survivors stay ("mask") or become D |D| ("signed_square").

    Of the square, |D| takes no gradient, as in the published code.
    """
    size = D.detach().abs()
    out = int(sparsity * D.numel())
    kept = (size > size.flatten().kthvalue(out).values).to(D.dtype) if out else torch.ones_like(size)
    return D * (kept * size if sparsify == "signed_square" else kept)


class KernelEntries(Delta):
    """W' = W + compete(c (dist(O1, I1) - dist(O2, I2))), O1, O2 `[out, rank / 2]`, I1, I2 `[in, rank / 2]`.

    As many numbers as LoRA, and a change whose rank they do not bound; the threshold is the `sparsity` quantile of
    |change|. Dense changes are built anew in the backward pass, never kept. The factors start uniform in
    +-1/sqrt(n rank / 2), so step 0 is near the base, not at it (entries of 1e-5 with "signed_square").
    Trainable scalars: rank (in + out). Source: SNELL, arXiv 2411.01800.
    """

    identity: ClassVar[bool] = False
    rank: Annotated[int, Field(gt=0, multiple_of=2)] = 8
    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.9
    sparsify: Literal["signed_square", "mask"] = "signed_square"
    scale: float = 0.1
    sites: str | list[str] = "linear"

    def tensors(self, site: Site) -> dict[str, P]:
        assert site.in_features is not None and site.out_features is not None
        half, found = self.rank // 2, {}
        for name, n in (("O", site.out_features), ("I", site.in_features)):
            bound = (n * half) ** -0.5
            for i in ("1", "2"):
                found[name + i] = P(torch.empty(n, half).uniform_(-bound, bound), "direction")
        return found

    def change(self, o1: Tensor, i1: Tensor, o2: Tensor, i2: Tensor) -> Tensor:
        """S `[out, in]`."""
        D = self.scale * (distances(o1, i1) - distances(o2, i2))
        return compete(D, self.sparsity, self.sparsify)

    def weight(self, t: Any, W: Tensor) -> Tensor:
        factors = (t.O1, t.I1, t.O2, t.I2)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return W + self.change(*factors).to(W.dtype)
        change: Tensor = checkpoint(self.change, *factors, use_reentrant=False, preserve_rng_state=False)  # type: ignore[assignment]
        return W + change.to(W.dtype)

    def product(self, t: Any, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return changed_linear(self._changed, x, W, b, t.O1, t.I1, t.O2, t.I2)

    def _changed(self, W: Tensor, *factors: Tensor) -> Tensor:
        return W + self.change(*factors)

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        return self.rank * ((site.in_features or 0) + (site.out_features or 0))
