"""W' = W + g s B A, g = 0 with probability p in a training step: LoRA that is switched off at random."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tunewise.core.delta import P
from tunewise.sites import Site

from .own_start import OwnStart

if TYPE_CHECKING:
    from tunewise.core.run import Run

__all__ = ["DeactivatedLoRA"]


class DeactivatedLoRA(OwnStart):
    """W' = W + g s B A; training: g = 0 with probability `deactivation`, else 1; evaluation: g = 1 - deactivation.

    Each site draws once per optimizer step, for the whole batch, whatever the micro-batches (the publication's code
    draws per forward pass, which gradient accumulation would turn into another method). A site that is off costs
    its base product alone and its A and B get no gradient, so the optimizer leaves them as they are; in compiled
    code both are computed and multiplied by g. A starts as N(0, 0.02), B at 0. Merging writes the expectation.
    In a loop of one's own `handle.watch(optimizer)` brings the draws. Trainable scalars: rank (in + out) per site.
    Source: CE-SSL, arXiv 2406.14377.
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "experts", "embedding")
    gives: ClassVar[frozenset[str]] = frozenset({"sizes", "components"})
    deactivation: Annotated[float, Field(ge=0, le=1)] = 0.2

    def start(self, site: Site) -> dict[str, P]:
        found = super().start(site)
        a = found["A"].value.normal_(0.0, 0.02)
        gate = P(torch.ones(()), "gate", trainable=False, saved=False)
        return {**found, "A": P(a, found["A"].tag, found["A"].axis), "gate": gate}

    def before_step(self, run: Run) -> None:
        mine: list[Any] = [t for _, _, t in run.handle.sites if t.part is self]
        draws = torch.rand(len(mine), generator=run.rng("deactivation"))
        for t, on in zip(mine, (draws >= self.deactivation).tolist(), strict=True):
            t.active = on
            t.gate.fill_(float(on))

    def _off(self, t: Any) -> bool:
        return t.training and not torch.compiler.is_compiling() and not getattr(t, "active", True)

    def trained(self, t: Any) -> tuple[Tensor, Tensor]:
        if not t.training:
            return t.A, (1 - self.deactivation) * t.B
        return t.A, t.gate * t.B if torch.compiler.is_compiling() else t.B

    def weight(self, t: Any, W: Tensor) -> Tensor:
        return W if self._off(t) else super().weight(t, W)

    def output(self, t: Any, x: Tensor, y: Tensor) -> Tensor:
        return _rooted(y) if self._off(t) else super().output(t, x, y)

    def product(self, t: Any, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return _rooted(F.linear(x, W, b)) if self._off(t) else super().product(t, x, W, b)

    def components(self, t: Any) -> tuple[Tensor, Tensor]:
        """((1 - deactivation) s B, A): their product is the W' - W of evaluation."""
        return self.s * (1 - self.deactivation) * t.B, t.A


def _rooted(y: Tensor) -> Tensor:
    """y with a place in the graph, so that a step in which every site is off still has a backward pass."""
    if y.requires_grad or not torch.is_grad_enabled():
        return y
    return y + torch.zeros((), dtype=y.dtype, device=y.device, requires_grad=True)
