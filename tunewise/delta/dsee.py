"""W' = W * M: weights that are pruned once while training, so that the tuned model is sparse."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from tunewise.core.delta import Delta, P
from tunewise.core.run import Run
from tunewise.init.base import site_weight
from tunewise.sites import Site

from .reselect import in_steps

__all__ = ["PrunedWeights"]


class PrunedWeights(Delta):
    """W' = W * M, M all ones until step `at`, then 0 for the share `sparsity` of smallest |W| over all sites.

    at    steps, or below 1 a share of the run's steps; what trains beside it repairs the damage afterwards
    The mask acts on the pretrained W alone: other deltas add to W * M, and merging fills what they touch. Nothing is
    trained here. Source: DSEE, arXiv 2111.00160, its unstructured form.
    """

    order: ClassVar[str] = "mask"
    unit: ClassVar[str] = "entry"
    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.5
    at: Annotated[float, Field(gt=0)] = 0.5
    sites: str | list[str] = "linear"

    def tensors(self, site: Site) -> dict[str, P]:
        return {"M": P(torch.ones_like(site_weight(site), dtype=torch.bool), "mask", trainable=False)}

    def weight(self, t: Any, W: Tensor) -> Tensor:
        return W * t.M

    def prepare(self, run: Run) -> None:
        in_steps(self.at, run)

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        if run.step != in_steps(self.at, run):
            return
        mine = [(t, site_weight(site).abs()) for _, site, t in run.handle.sites if t.part is self]
        sizes = torch.cat([size.reshape(-1) for _, size in mine])
        threshold = sizes.kthvalue(max(int(self.sparsity * len(sizes)), 1)).values
        for t, size in mine:
            t.M = size > threshold
