"""What stands in for the forward of a frozen block."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from tunewise.core.forward import forward_of

if TYPE_CHECKING:
    from .features import Features

__all__ = ["Reached", "Served"]


class Reached(Exception):
    """The last frozen block has answered; the rest of the pass is not needed."""


class Served:
    """Stands in for the forward of one frozen block."""

    def __init__(self, owner: Features, index: int, base: Callable[..., Any]) -> None:
        self.owner, self.index, self.base = owner, index, base
        self.__signature__ = inspect.signature(base)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.owner.collected is not None:
            return self.owner.collect(self.index, self.base(*args, **kwargs))
        if self.owner.states is not None:
            given = args[0] if args else kwargs["hidden_states"]
            hidden = self.owner.states.get(self.index, given)
            return (hidden, *[None] * (self.owner.tupled - 1)) if self.owner.tupled else hidden
        return self.base(*args, **kwargs)

    @classmethod
    def install(cls, owner: Features, index: int, block: nn.Module) -> Served:
        """On the block, or below what an adaptation has installed on it."""
        inner = forward_of(block)
        made = cls(owner, index, block.forward if inner is None else inner.base)
        if inner is None:
            block.__dict__["forward"] = made
        else:
            inner.base = made
        return made

    def remove(self, block: nn.Module) -> None:
        """Somebody may have been installed above or taken away from above since."""
        inner = forward_of(block)
        if inner is not None and inner.base is self:
            inner.base = self.base
        elif block.__dict__.get("forward") is self:
            if getattr(self.base, "__func__", None) is type(block).forward:
                del block.__dict__["forward"]
            else:
                block.__dict__["forward"] = self.base
