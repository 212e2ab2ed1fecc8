"""An adaptation is all deltas of one recipe on one backbone; its handle attaches, switches, saves and removes
them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tunewise.sites import Site, find_sites, hide_from_saving, is_quantized, refuse_wrapped

from .build import PREFIX, Existing, Info, build_part, root_site
from .delta import Delta, SiteDelta, keeps_in_out
from .errors import UserError
from .plans import rebuild
from .recipe import Recipe

__all__ = ["Adaptation", "Existing", "Info", "handles", "root_site"]

WORDS = re.compile(
    "(?<=[a-z0-9])(?=[A-Z][a-z])|(?<=[A-Z])(?=[A-Z][a-z])"
)  # LoRA is one word, SoftPrompt are two


def handles(model: nn.Module) -> dict[str, Any]:
    """The adaptations attached to this model, by name."""
    return model.__dict__.setdefault("tw_adaptations", {})  # type: ignore[no-any-return]


class Adaptation:
    """The deltas of one recipe on one model: tensors, switching, and the way back.

    Created by `tw.attach`. `sites` holds every (key, site, SiteDelta); `existing` the trained base
    parameters.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, name: str, dtype: torch.dtype, plain: bool, undo: bool
    ) -> None:
        if name in handles(model):
            raise UserError(
                f'The model already has an adaptation called "{name}"; give another name or detach it.'
            )
        if not name.isidentifier():
            raise UserError(f'"{name}" cannot name an adaptation: letters, digits and _ only.')
        self.model, self.recipe, self.name, self.dtype = model, recipe, name, dtype
        self.plain, self.undo, self.active, self.share = plain, undo, False, 1.0
        self.sites: list[tuple[str, Site, SiteDelta]] = []
        self.existing: dict[str, Existing] = {}
        self.owned: dict[str, SiteDelta] = {}
        self.committed: dict[str, tuple[Tensor, Tensor]] = {}
        self.away = False
        self.moved: dict[str, Tensor] = {}
        self.built = False
        self.merged: dict[str, Tensor] | None = None
        self._training: dict[str, bool] = {}

    @property
    def deltas(self) -> list[tuple[str, Delta]]:
        """(key, part) of every delta and head, in recipe order; keys name the saved tensors."""
        found: list[tuple[str, Delta]] = []
        for part in [*self.recipe["delta"], *self.recipe["head"]]:
            assert isinstance(part, Delta)
            key = WORDS.sub("_", type(part).__name__).lower()
            taken = [k for k, _ in found if k == key or k.rstrip("0123456789") == key + "_"]
            found.append((key if not taken else f"{key}_{len(taken) + 1}", part))
        return found

    def build(self, start: bool = True) -> None:
        """Creates the tensors at their sites, freezes the backbone, switches this adaptation on; `start` runs
        `attached`.
        """
        self._refuse_rows()
        everything = find_sites(self.model)
        refuse_wrapped(self.model, everything)
        siblings = [h for h in handles(self.model).values() if h.active]
        self._training = {n: p.requires_grad for n, p in self.model.named_parameters() if PREFIX not in n}
        for other in siblings:
            other.deactivate()
        handles(self.model)[self.name] = self
        try:
            for key, part in self.deltas:
                build_part(self, key, part, everything)
            self._freeze()
            self.activate()
            hide_from_saving(self.model)
            for _, part in self.deltas if start else ():
                part.attached(self)
        except BaseException:
            self.undo = True  # nothing has been trained yet
            Adaptation.detach(self)
            for other in siblings:
                other.activate(only=False)
            raise
        self.built = True

    def _freeze(self) -> None:
        for name, p in self.model.named_parameters():
            if f".{PREFIX}" not in f".{name}":
                p.requires_grad_(False)
        for e in self.existing.values():
            e.ours.requires_grad_(True)

    def activate(self, *, only: bool = True, share: float | None = None) -> None:
        """Switches this adaptation on; with `only`, the others off and every share of a mix back to 1.

        `share` weighs the change that this adaptation makes (see `tw.mix`); None leaves it as it is.
        """
        if self.merged is not None:
            raise UserError(f'The adaptation "{self.name}" is merged into the model; unmerge it first.')
        self._refuse_rows()
        for other in handles(self.model).values() if only else ():
            other.weigh(1.0)
            if other is not self:
                other._switch(on=False)
        self.weigh(self.share if share is None else share)
        self._switch(on=True)
        rebuild(self.model)

    def deactivate(self) -> None:
        """Switches this adaptation off: the model computes what it did before."""
        self._refuse_rows()
        self._switch(on=False)
        rebuild(self.model)

    def _refuse_rows(self) -> None:
        if "tw_rows" in self.model.__dict__:
            raise UserError("Inside tw.rows nothing is attached, switched or detached: leave it first.")

    def weigh(self, share: float) -> None:
        """The weight of this adaptation's change in a mix, while it is active."""
        for _, _, t in self.sites if share != self.share else ():
            t.share = share
        self.share = share

    def _switch(self, on: bool) -> None:
        if on is not self.active:
            self._swap(on)
        self.active = on

    def _swap(self, on: bool) -> None:
        if on:
            self._refuse_written_twice()
        for name, e in self.existing.items():
            new, old = (e.ours, e.original) if on else (e.original, e.ours)
            if (new.dtype, new.device) != (old.dtype, old.device):  # the model was cast or moved meanwhile
                new.data = new.data.to(old.device, old.dtype)
            if on and self.undo and any(getattr(m, n) is not e.original for m, n in e.places):
                raise UserError(
                    f"{name} is already trained by another active adaptation; switch that off first."
                )
            for module, parameter in e.places:
                module._parameters[parameter] = new
        for weight, other in self.committed.values():
            weight.data, other.data = other.data.to(weight.device, weight.dtype), weight.data
        self.away = not on

    def _refuse_written_twice(self) -> None:
        active = [h for h in handles(self.model).values() if h.active and h is not self]
        for name in self.committed:
            if any(name in h.committed for h in active):
                raise UserError(f"{name} is written by another active adaptation too; switch that off first.")

    def commits(self) -> dict[str, tuple[Tensor, Tensor]]:
        """{name: (as written, as it was)} of the base tensors that this adaptation has written."""
        return {n: pair[::-1] if self.away else pair for n, pair in self.committed.items()}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model, for the time of a `with` block."""
        was = self.active
        if not self.undo and self.existing:
            raise UserError(
                "The base weights were trained in place without a copy; attach with undo=True to switch off."
            )
        self.deactivate()
        try:
            yield
        finally:
            if was:
                self.activate(only=False)

    def _owners(self) -> Iterator[tuple[str, str, str, SiteDelta]]:
        """(how its saved tensors begin, key, site's name, tensors) of everything that owns some."""
        for key, owner in self.owned.items():
            yield f"shared.{key}", key, "", owner
        for key, site, t in self.sites:
            yield f"{site.name}.{key}" if site.name else key, key, site.name, t

    def tensors(self) -> dict[str, Info]:
        """Every trainable tensor by its saved name, in a fixed order; `info.tensor` is the live parameter."""
        found: dict[str, Info] = {}
        for prefix, key, site, t in self._owners():
            for name, (tag, axis, trainable, _) in t.meta.items():
                if trainable:
                    found[f"{prefix}.{name}"] = Info(getattr(t, name), tag, axis, key, site, t.part)
        for name, e in self.existing.items():
            found[name] = Info(e.ours, e.tag, None, e.owner, name.rpartition(".")[0], e.part)
        return found

    def buffers(self) -> dict[str, Tensor]:
        """Saved tensors that are not trained (indices, frozen projections)."""
        return {
            f"{prefix}.{name}": getattr(t, name)
            for prefix, _, _, t in self._owners()
            for name, (_, _, trainable, saved) in t.meta.items()
            if saved and not trainable
        }

    def locate(self, name: str) -> tuple[SiteDelta, str] | Existing:
        """Where a tensor of `tensors()` lives, so that it can be put anew."""
        if name in self.existing:
            return self.existing[name]
        prefix, _, last = name.rpartition(".")
        for begins, _, _, t in self._owners():
            if begins == prefix:
                return t, last
        raise UserError(f'The adaptation "{self.name}" has no tensor {name}.')

    def put(self, name: str, new: nn.Parameter) -> None:
        """Replaces a trainable tensor, also by one of another shape."""
        place = self.locate(name)
        if isinstance(place, Existing):
            place.ours = new
            if self.active:
                for module, parameter in place.places:
                    module._parameters[parameter] = new
        else:
            place[0]._parameters[place[1]] = new

    def commit(self, site: Site, change: Tensor) -> None:
        """W <- W + change, `[out, in]`: the only way a base tensor is written.

        Bit by bit, `detach` undoes it, `deactivate` takes it away and `activate` brings it back.
        """
        name = site.name if site.parameter else f"{site.name}.weight"
        if not self.active:
            raise UserError(f'The adaptation "{self.name}" is switched off, so it cannot write {name}.')
        weight = site.module.get_parameter(site.parameter or "weight")
        if is_quantized(site.module):
            raise UserError(f"{site.name} is quantized: its weight cannot take a change without loss.")
        if name not in self.committed:
            self.committed[name] = (weight, weight.detach().clone())
        if self.built and name not in self.moved:  # from now on part of what has been learnt
            at_start = torch.equal(weight, self.committed[name][1])
            self.moved[name] = self.committed[name][1] if at_start else weight.detach().clone()
        with torch.no_grad():
            mine = weight.transpose(-1, -2) if keeps_in_out(site) else weight
            change = change.to(weight.device, weight.dtype)
            mine.add_(change) if site.rows is None else mine.index_add_(-2, site.rows, change)

    def _take_away(self) -> None:
        mine = {*self.owned.values(), *(t for _, _, t in self.sites)}
        for module in list(self.model.modules()):
            for child in [n for n, m in module._modules.items() if m in mine]:
                del module._modules[child]

    def detach(self) -> None:
        """Takes everything away; the base is bit-equal to what it was. Raises `UserError` where it no longer
        can be.
        """
        if self.existing and not self.undo:
            raise UserError(
                "The base weights were trained in place without a copy (undo=False): load the base model again."
            )
        if self.merged is not None:
            raise UserError(f'The adaptation "{self.name}" is merged into the model; unmerge it first.')
        self.deactivate()
        self._take_away()
        del handles(self.model)[self.name]
        rebuild(self.model)
        hide_from_saving(self.model)
        for name, p in self.model.named_parameters():
            if name in self._training and not handles(self.model):
                p.requires_grad_(self._training[name])
