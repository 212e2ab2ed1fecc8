"""theta' = theta + trained change, for a selection of the backbone's own parameters."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import nn

from tunewise.core.delta import Delta
from tunewise.core.errors import UserError
from tunewise.sites import KINDS, find_sites, select

__all__ = ["ExistingWeights"]


class ExistingWeights(Delta):
    """The backbone's own parameters at `sites` are trained: `which` of "all", "weight", "bias".

    `sites="all"` with `which="all"` is full fine-tuning, position tables and other bare parameters included.
    A container site (block, attention, mlp) stands for everything below it. With `required`, a model that has no
    such parameter is refused (`UserError`); else the delta is empty there.
    """

    kinds: ClassVar[tuple[str, ...]] = KINDS
    unit: ClassVar[str] = "entry"
    sites: str | list[str] = "all"
    which: Literal["all", "weight", "bias"] = "all"
    required: bool = False

    def existing(self, model: nn.Module) -> dict[str, str]:
        own = {n: p for n, p in model.named_parameters() if ".tw_" not in f".{n}"}
        if self.sites == "all":
            chosen = set(own)
        else:
            chosen = set()
            for site in select(find_sites(model), self.sites):
                if site.kind == "experts":
                    chosen.add(site.name)
                else:
                    chosen |= {n for n in own if n.startswith(f"{site.name}.")}
        tags = {n: "bias" if n.endswith("bias") else "weight" for n in own}
        found = {n: tags[n] for n in own if n in chosen and self.which in ("all", tags[n])}
        if self.required and not found:
            what = {"all": "parameters", "weight": "weights", "bias": "biases"}[self.which]
            raise UserError(
                f"{type(model).__name__} has no {what} at {self.sites!r}, so there is nothing to train; "
                "layernorm_tuning and lora need none."
            )
        return found
