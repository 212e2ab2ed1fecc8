"""|W * M|_*: selected entries are pulled to a low-rank matrix."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor

from tunewise.core.errors import UserError
from tunewise.core.part import Part
from tunewise.core.run import Run
from tunewise.delta.entries import SparseEntries
from tunewise.init.base import site_weight
from tunewise.sites import Site

__all__ = ["NuclearNorm"]


class NuclearNorm(Part):
    """L = weight |W' * M|_*, of one weight that is drawn for each step; M selects the trained entries.

    Drawn among matrices whose sides exceed `wider` and that have more than 100 selected entries. One SVD per
    micro-batch. Raises `UserError` where no weight is wide enough. Source: SaRA, arXiv 2409.06633.
    """

    slot: ClassVar[str] = "objective"
    weight: Annotated[float, Field(ge=0)] = 5e-4
    wider: NonNegativeInt = 64

    def _places(self, run: Run) -> list[tuple[Site, Any]]:
        found: list[tuple[Site, Any]] = [
            (s, t) for _, s, t in run.handle.sites if isinstance(t.part, SparseEntries)
        ]
        sides = [min(s.in_features or 0, s.out_features or 0) for s, _ in found]
        fit = [p for p, n in zip(found, sides, strict=True) if n > self.wider and p[0].kind != "experts"]
        if not fit and self.weight:
            raise UserError(
                f"NuclearNorm: no weight with trained entries has sides above {self.wider} "
                f"(the widest here: {max(sides, default=0)}); lower wider or leave the penalty out."
            )
        return [p for p in fit if len(p[1].index) > 100]

    def before_step(self, run: Run) -> None:
        places = self._places(run)
        if places and self.weight:
            make = run.rng("nuclear_norm")
            self.state["place"] = int(torch.randint(len(places), (1,), generator=make))

    def loss(self, run: Run, batch: Any, logits: Tensor, outputs: Any, units: float) -> Tensor:
        """The penalty, shared among the micro-batches of the step by their units."""
        places = self._places(run)
        if not places:
            return logits.new_zeros(())
        site, t = places[self.state.get("place", 0)]
        norm = torch.linalg.matrix_norm(t.part.selected(t, site_weight(site)), "nuc")
        return norm * (batch.units.sum() / units)
