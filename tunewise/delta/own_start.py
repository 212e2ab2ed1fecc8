"""What has LoRA's equations and a start of its own."""

from __future__ import annotations

from typing import ClassVar

from tunewise.core.delta import P
from tunewise.core.errors import UserError
from tunewise.sites import Site

from .lora import LoRA

__all__ = ["OwnStart"]


class OwnStart(LoRA):
    """W' = W + s B A whose tensors start in the way that the method says: `init` is refused.

    Subclasses give `start(site)` in the place of `tensors`, and `trained(t)` where A and B are computed from it.
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear",)

    def start(self, site: Site) -> dict[str, P]:
        """The tensors owned at one site."""
        return super().tensors(site)

    def tensors(self, site: Site) -> dict[str, P]:
        if self.init is not None:
            name = type(self).__name__
            raise UserError(f"{name} has a start of its own: leave out init, or use LoRA with it.")
        return self.start(site)
