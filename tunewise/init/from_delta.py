"""s B A = best rank-r approximation of another task's W' - W."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from tunewise.core.errors import UserError
from tunewise.core.handle import restore

from .base import Init, Start
from .svd import split, top_svd

if TYPE_CHECKING:
    from tunewise.core.adaptation import Adaptation

__all__ = ["FromDelta"]

NAME = "start_from_delta"
NOISE = 1e-6


class FromDelta(Init):
    """s B A = U_r S_r V_r' of dW = U S V', the change that the saved adaptation at `path` makes to this base.

    path  a folder with adaptation.json, or a run's folder: any mergeable adaptation of the same base model
    Step 0 is the other task's model as far as rank r holds it, not the base. Directions that dW lacks (sites it
    leaves alone, a lower rank) start as LoRA does: A random, B = 0. Only the weights are taken over, no head.
    Raises `UserError` where dW is no change of weights, or touches none of the sites.
    """

    identity: ClassVar[bool] = False
    path: str

    def gather(self, adaptation: Adaptation) -> dict[str, Tensor]:
        model = adaptation.model
        other = restore(model, self.path, name=NAME)
        try:
            changes = other.materialize()
        finally:
            other.detach()
            adaptation.activate()
        mine = [site for _, site, t in adaptation.sites if getattr(t.part, "init", None) is self]
        if not any(site.name in changes for site in mine):
            raise UserError(
                f"{self.path} changes none of these sites; it changes {', '.join(sorted(changes)[:3])}."
            )
        return {
            site.name: changes[site.name]
            if site.rows is None
            else changes[site.name].index_select(-2, site.rows)
            for site in mine
            if site.name in changes
        }

    def factors(self, W: Tensor, rank: int, s: float, found: Any) -> Start:
        change: Tensor = torch.zeros_like(W) if found is None else found.to(W.device, W.dtype)
        u, sigma, v = top_svd(change, rank)
        start = split(u, sigma, v, s)
        bound = W.shape[-1] ** -0.5
        empty = (sigma <= NOISE * sigma.amax(-1, keepdim=True)).unsqueeze(-1)
        fresh = torch.empty_like(start.A).uniform_(-bound, bound)
        return Start(torch.where(empty, fresh, start.A), start.B.masked_fill(empty.mT, 0.0))
