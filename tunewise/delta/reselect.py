"""W' = W + scatter(values) with entries that are picked anew while training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from tunewise.core.errors import UserError
from tunewise.core.forward import is_quantized
from tunewise.core.run import Run
from tunewise.init.base import site_weight
from tunewise.sites import Site

from .entries import SparseEntries, smallest

__all__ = ["ReselectedEntries", "in_steps"]


def in_steps(given: float, run: Run) -> int:
    """A number of steps that is given as such, or below 1 as a share of the run's."""
    if given >= 1:
        return int(given)
    if not run.total_steps:
        raise UserError(f"{given} is a share of the run, whose length is not known here: give it in steps.")
    return max(round(given * run.total_steps), 1)


class ReselectedEntries(SparseEntries):
    """Every `every` steps the entries are picked from the current W'; what leaving entries have learnt stays in W.

    every    steps, or below 1 a share of the run's steps
    times    how often at most; None: as often as it is due
    within   only among entries that are selected already: the selection can only shrink
    Entries that stay keep value and moments; new ones start at 0, with the step count of the others. Changes of
    leaving entries are committed to the base, which detaching undoes. Where the selection is the same, nothing
    happens. Raises `UserError` on a quantized base, and for a share where the length of the run is not known.
    """

    every: Annotated[float, Field(gt=0)] = 400
    times: PositiveInt | None = None
    within: bool = False

    def attached(self, adaptation: Any) -> None:
        super().attached(adaptation)
        for _, site, t in adaptation.sites:
            if t.part is self and is_quantized(site.module):
                raise UserError(
                    f"{site.name} is quantized and cannot keep what leaving entries have learnt: "
                    "load the base model unquantized, or use random_sparse."
                )

    def prepare(self, run: Run) -> None:
        in_steps(self.every, run)

    def after_step(self, run: Run) -> None:
        interval = in_steps(self.every, run)
        if run.step % interval or (self.times is not None and run.step // interval > self.times):
            return
        for key, site, t in run.handle.sites:
            if t.part is self:
                self._again(run, f"{site.name}.{key}.values", site, t)

    @torch.no_grad()
    def _again(self, run: Run, name: str, site: Site, t: Any) -> None:
        W = site_weight(site)
        old = t.index.long()
        new = self.choice(self.weight(t, W), site, run.step)
        if self.within:
            new = new[torch.isin(new, old)]
        if torch.equal(new, old):
            return
        run.tensors.replace(name, self._mover(run, site, t, old, new))

    def _mover(self, run: Run, site: Site, t: Any, old: Tensor, new: Tensor) -> Callable[[Tensor], Tensor]:
        where, stays = torch.searchsorted(old, new), torch.isin(new, old)
        first = [True]

        def move(values: Tensor) -> Tensor:
            if first[0]:  # the values come before their moments: index and base change together with them
                first[0] = False
                leaving = ~torch.isin(old, new)
                shape = site_weight(site).shape
                change = values.new_zeros(shape.numel())
                change[old[leaving]] = self.scale * values[leaving]
                run.handle.commit(site, change.view(shape))
                t.index = new.to(smallest(change))
            return torch.where(stays, torch.cat([values, values.new_zeros(1)])[where], 0.0)

        return move
