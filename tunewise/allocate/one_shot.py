"""I_l = mean (W_l * (dL/dB_l A_l))^2: once before training, the sites of low importance get the lower rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from tunewise.core.errors import UserError
from tunewise.core.part import Part
from tunewise.init.base import site_weight
from tunewise.loop.quiet import quiet
from tunewise.sites import Site

if TYPE_CHECKING:
    from tunewise.core.run import Run

__all__ = ["OneShotRanks"]


class OneShotRanks(Part):
    """I_l = mean over batches and entries of (W_l * (dL/dB_l A_l))^2; the floor(fraction L) sites of least I_l get
    rank `low` (default 2 floor(rank / 4), at least 1), the others keep theirs.

    One pass over the training rows (or `batches` of them) without dropout and without an update; dL/dB A stands
    for the gradient of W, so nothing dense is kept. "fisher" leaves W_l out. Ties go by the order of sites. Acts
    on low-rank deltas with tensors A and B. Raises `UserError` where there are none, where `low` is more than a
    site's rank, and for runs without rows. Source: CE-SSL, arXiv 2406.14377.
    """

    slot: ClassVar[str] = "allocate"
    needs: ClassVar[frozenset[str]] = frozenset({"sizes", "backprop"})
    streams: ClassVar[tuple[str, ...]] = ("calibration",)
    fraction: Annotated[float, Field(ge=0, le=1)] = 0.6
    low: PositiveInt | None = None
    score: Literal["taylor", "fisher"] = "taylor"
    batches: PositiveInt | None = None

    def prepare(self, run: Run) -> None:
        places = {
            f"{site.name}.{key}": (site, t)
            for key, site, t in run.handle.sites
            if {"A", "B"} <= t.meta.keys() and "sizes" in t.part.gives
        }
        if not places:
            raise UserError("OneShotRanks finds no low-rank delta with tensors A and B; the nearest is lora.")
        scores = self._scores(run, list(places.values()))
        order = torch.argsort(torch.tensor(scores), stable=True).tolist()
        names, sizes = list(places), run.tensors.sizes()
        chosen = {names[i] for i in order[: int(self.fraction * len(names))]}
        for name in chosen:
            low = self.low or max(2 * (sizes[name] // 4), 1)
            if low > sizes[name]:
                raise UserError(f"OneShotRanks: low={low} is more than the rank {sizes[name]} of {name}.")
            run.tensors.resize(name, low)
        ranks = run.tensors.sizes()
        self.state |= {"scores": dict(zip(names, scores, strict=True)), "ranks": {n: ranks[n] for n in names}}
        run.log(low_rank_sites=len(chosen), total_rank=sum(ranks[n] for n in names))

    def _scores(self, run: Run, places: list[tuple[Site, Any]]) -> list[float]:
        stream = run.batches("calibration", getattr(run.settings, "batch_size", 32))
        count = min(self.batches or len(stream), len(stream))
        total = torch.zeros(len(places), dtype=torch.float64)
        with quiet(run.model), torch.enable_grad():
            for _ in range(count):
                batch = run.collate(next(stream))
                loss = run.loss(batch, float(batch.units.sum()))
                grads = torch.autograd.grad(loss, [t.B for _, t in places])
                total += torch.stack([self._importance(*p, g) for p, g in zip(places, grads, strict=True)])
        return (total / count).tolist()  # type: ignore[no-any-return]

    @torch.no_grad()
    def _importance(self, site: Site, t: Any, grad: Tensor) -> Tensor:
        change = grad @ t.A
        if self.score == "taylor":
            change = change * site_weight(site).to(change)
        return change.double().square().mean().cpu()
