"""theta_0 = theta of a saved adaptation: a start for any delta, copied or refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from tunewise.core.delta import Delta
from tunewise.core.errors import UserError
from tunewise.core.handle import read_adaptation

if TYPE_CHECKING:
    from tunewise.core.adaptation import Adaptation

__all__ = ["FromSaved", "similarity"]


class FromSaved(Delta):
    """theta_0 = theta of the adaptation in the folder `path`, for all deltas of the recipe that stand before it.

    Heads are left out: a new task has a new one. Frozen tensors (indices, projections) are taken over as well. Has
    no equation of its own, and acts at the start alone: `lora + FromSaved(path="runs/source")`.
    path  a folder with adaptation.json, or a run's folder; None: nothing is done
    Raises `UserError`, before anything is written, unless names and shapes agree exactly: another rank, length,
    width, place or kind of delta.
    """

    kinds: ClassVar[tuple[str, ...]] = ("model",)
    path: str | None = None

    @property
    def identity(self) -> bool:  # type: ignore[override]
        """Without a folder the other deltas' own starts stand."""
        return self.path is None

    @torch.no_grad()
    def attached(self, adaptation: Adaptation) -> None:
        if self.path is None:
            return
        described, saved = read_adaptation(self.path)
        theirs = {n: v for n, v in saved.items() if described["tags"].get(n) != "head"}
        moved = next((n for n in saved if n.startswith("commit.")), None)
        if moved is not None:
            raise UserError(
                f"{self.path} has changed the base at {moved.removeprefix('commit.')}: restore it instead."
            )
        mine = self._mine(adaptation)
        names = _matched(mine, theirs, getattr(adaptation.model, "base_model_prefix", ""), self.path)
        for name, place in mine.items():
            value = theirs[names[name]]
            if value.shape != place.shape:
                raise UserError(
                    f"{self.path} has {name} of shape {tuple(value.shape)}, and here it is {tuple(place.shape)}: "
                    "use the options that it was made with."
                )
        for name, place in mine.items():
            place.copy_(theirs[names[name]].to(place.device, place.dtype))

    @staticmethod
    def _mine(adaptation: Adaptation) -> dict[str, Tensor]:
        """Every saved tensor of the deltas, trained or frozen; those of heads are left out."""
        infos = adaptation.tensors()
        heads = {n for n, info in infos.items() if info.part.slot == "head"}
        found: dict[str, Tensor] = {n: i.tensor for n, i in infos.items() if n not in heads}
        keys = {key for key, part in adaptation.deltas if part.slot == "head"}
        for name, value in adaptation.buffers().items():
            if not keys & set(name.split(".")):
                found[name] = value
        if not found:
            raise UserError("FromSaved starts the deltas of a recipe, and there are none beside it.")
        return found


def _matched(mine: dict[str, Any], theirs: dict[str, Any], prefix: str, path: str) -> dict[str, str]:
    """Their name of each of mine; a base model with and without a head has the same blocks."""

    def plain(name: str) -> str:
        return name.removeprefix(f"{prefix}.") if prefix else name

    known = {plain(name): name for name in theirs}
    lacking = next((name for name in mine if plain(name) not in known), None)
    if lacking is not None:
        raise UserError(
            f"{path} has no tensor {lacking}: it was made with another method, or for other places."
        )
    more = known.keys() - {plain(name) for name in mine}
    if more:
        raise UserError(f"{path} has a tensor {known[min(more)]} that there is no place for here.")
    return {name: known[plain(name)] for name in mine}


def similarity(first: str, second: str) -> float:
    """cos of the mean prompt vectors of two saved adaptations: which source task may help which target.

    Raises `UserError` for adaptations without prompts, or with prompts of another width. Source: PANDA, arXiv
    2208.10160.
    """
    means = []
    for path in (first, second):
        described, state = read_adaptation(path)
        prompts = [
            v.float().flatten(0, -2) for n, v in sorted(state.items()) if described["tags"].get(n) == "prompt"
        ]
        if not prompts:
            raise UserError(f"{path} has no prompt to compare.")
        means.append(torch.cat([p.mean(0) for p in prompts]))
    if means[0].shape != means[1].shape:
        raise UserError(f"The prompts of {first} and {second} are not of the same width or number of places.")
    return float(torch.cosine_similarity(means[0], means[1], dim=0))
