"""W' = M * T + (1 - M) * W, M = u v: trained weights mixed with the pretrained ones, entry by entry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from tunewise.core.delta import Delta, P
from tunewise.init.base import site_weight
from tunewise.sites import Site

from .fused import changed_linear

if TYPE_CHECKING:
    from tunewise.core.run import Run

__all__ = ["LooseMixup", "WeightMixup"]


def _mixed(W: Tensor, T: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return torch.addcmul(W, u * v, T - W)


def _loose(W: Tensor, T: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return u * v * T + (1 - u) * (1 - v) * W


class WeightMixup(Delta):
    """W' = M * T + (1 - M) * W, M = u v in [0, 1], T `[out, in]` trained from W, u `[out, 1]` and v `[1, in]` trained
    from N(1, spread) clamped to [0, 1].

    u and v are clamped again after every optimizer step, outside of the gradient. u = v = 1 is full fine-tuning of
    the site, u = 0 or v = 0 the pretrained layer; W' = W at step 0 whatever M. T is a second copy of the weight
    beside the frozen one, as trained existing weights are. T and u, v learn together here; the publication trains
    u, v on other rows, in an upper level with finite-difference hypergradients, and averages over restarted folds:
    that is a loop's work and not here. Trainable scalars: in out + in + out per site. Source: attention-guided
    weight mixup (NAACL 2024).
    """

    spread: Annotated[float, Field(ge=0)] = 0.005
    sites: str | list[str] = "linear"

    def tensors(self, site: Site) -> dict[str, P]:
        W = site_weight(site)
        rows, columns = W.shape
        u = torch.ones(rows, 1).add_(torch.randn(rows, 1), alpha=self.spread).clamp_(0, 1)
        v = torch.ones(1, columns).add_(torch.randn(1, columns), alpha=self.spread).clamp_(0, 1)
        return {"T": P(W, "weight"), "u": P(u, "mix"), "v": P(v, "mix")}

    def weight(self, t: Any, W: Tensor) -> Tensor:
        return _mixed(W, t.T, t.u, t.v)

    def product(self, t: Any, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return changed_linear(_mixed, x, W, b, t.T, t.u, t.v)

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        mine: list[Any] = [t for _, _, t in run.handle.sites if t.part is self]
        for t in mine:
            t.u.clamp_(0, 1)
            t.v.clamp_(0, 1)

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        rows, columns = site.out_features or 0, site.in_features or 0
        return rows * columns + rows + columns


class LooseMixup(WeightMixup):
    """W' = (u v) * T + (1 - u)(1 - v) * W, as the publication's code has it: the shares do not add up to 1.

    Else as `WeightMixup`; W' differs from W at step 0 by the spread of u and v.
    """

    identity: ClassVar[bool] = False

    def weight(self, t: Any, W: Tensor) -> Tensor:
        return _loose(W, t.T, t.u, t.v)

    def product(self, t: Any, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return changed_linear(_loose, x, W, b, t.T, t.u, t.v)
