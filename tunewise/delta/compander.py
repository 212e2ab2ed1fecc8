"""W' = a arctan(v / b): weights, or changes of weights, that cannot grow beyond a pi / 2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from tunewise.core.delta import Delta, P
from tunewise.init.base import site_weight
from tunewise.sites import Site

from .fused import changed_linear

__all__ = ["CompandedChange", "Compander"]

ROOM = 1.05


def _companded(W: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return a * torch.arctan(v / b)


def _changed(W: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return W + _companded(W, v, a, b)


class Compander(Delta):
    """W' = psi(v) = a arctan(v / b), v `[out, in]` trained from b tan(W / a), so that W' = W at step 0 (to rounding).

    |W'| < a pi / 2, with a = 1.05 max|W| 2 / pi of the site; b = a / `slope` pushes small weights away from 0. With
    `learned` a and b are trained too. W' takes the weight's place, so it stands first among several deltas; v
    needs as much memory as trained weights do, beside the frozen W. Weight decay acts on v. Trainable scalars:
    in out (+ 2) per site. Source: weight compander, arXiv 2306.16993, whose abstract alone is public here: a bounded
    non-linear function that keeps weights away from 0 and whose parameters may be learned is its, arctan is ours.
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "experts", "embedding")
    identity: ClassVar[bool] = False
    order: ClassVar[str] = "mask"
    slope: Annotated[float, Field(gt=0)] = 1.5
    learned: bool = False
    sites: str | list[str] = "linear"

    def tensors(self, site: Site) -> dict[str, P]:
        W = site_weight(site)
        a = (ROOM * 2 / math.pi * W.abs().amax()).clamp(min=1e-6)
        b = a / self.slope
        return {
            "v": P(self.start(W, a, b), "weight"),
            "a": P(a, "scale", trainable=self.learned),
            "b": P(b, "scale", trainable=self.learned),
        }

    def start(self, W: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """v at step 0."""
        return b * torch.tan(W / a)

    def weight(self, t: Any, W: Tensor) -> Tensor:
        return _companded(W, t.v, t.a, t.b)

    def product(self, t: Any, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return changed_linear(_companded, x, W, b, t.v, t.a, t.b)

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        whole = (site.in_features or 0) * (site.out_features or 0) * site.count
        return whole + 2 * self.learned


class CompandedChange(Compander):
    """W' = W + a arctan(v / b), v `[out, in]` starting at 0, |W' - W| < a pi / 2; a, b and the rest as in `Compander`.

    No change of a weight can be larger than 1.05 times the site's largest weight.
    """

    identity: ClassVar[bool] = True
    order: ClassVar[str] = "add"

    def start(self, W: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.zeros_like(W)

    def weight(self, t: Any, W: Tensor) -> Tensor:
        return _changed(W, t.v, t.a, t.b)

    def product(self, t: Any, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return changed_linear(_changed, x, W, b, t.v, t.a, t.b)
