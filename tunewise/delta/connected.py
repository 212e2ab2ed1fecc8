"""a_l = f(D_l y_l + b_l), h_l = y_l + U_l (a_l + R_l s_{l-1}), s_l = s_{l-1} + Side_l([s_{l-1}; a_l]): adapters that
a path beside the encoder joins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from tunewise.core.delta import Delta, P
from tunewise.core.errors import UserError
from tunewise.core.forward import first_tensor
from tunewise.sites import Site

from .adapter import FUNCTIONS, Function
from .random import kaiming

__all__ = ["ConnectedAdapters"]


class ConnectedAdapters(Delta):
    """Inside, behind block l: h_l = y_l + U_l (a_l + R_l s_{l-1}) + c_l with a_l = f(D_l y_l + b_l); aside, for each
    position: s_l = s_{l-1} + W2_l f(W1_l [s_{l-1}; a_l]), s_0 = P h_0; in the end h_L + V s_L.

    y_l `[..., width]` is what the frozen block gives, a_l `[..., size]`, s_l `[..., aside]`. D, P and W1 start
    uniform in +-1/sqrt(in), W2 as N(0, 0.02), and U, V, R at 0, so step 0 is the base model. The path gives every
    inside adapter a gradient that crosses no frozen layer. Each stack (encoder, decoder) has a path of its own. The
    state travels with the tensor that one block hands to the next; where something between them makes a new tensor, it
    is refused in words (`UserError`). Trainable scalars per block: size (2 width + 1 + aside) + width + aside (2 aside
    + size), and width x aside at both ends of a stack. Source: arXiv 2208.09847 (inside and aside modules); the
    equations are our reading of its abstract.
    """

    kinds: ClassVar[tuple[str, ...]] = ("block",)
    unit: ClassVar[str] = "row"
    size: PositiveInt = 16
    aside: PositiveInt = 16
    function: Function = "relu"
    sites: str | list[str] = "block"
    # Names of the first and of the last blocks, and the state in compiled code; no annotations, so no options.
    _ends = (frozenset(), frozenset())  # type: tuple[frozenset[str], frozenset[str]]
    _carried = None  # type: Any

    def shared(self, sites: Sequence[Site]) -> dict[str, P]:
        first = {s.stack: s.name for s in reversed(sites)}
        last = {s.stack: s.name for s in sites}
        self._ends = frozenset(first.values()), frozenset(last.values())
        return {}

    def tensors(self, site: Site) -> dict[str, P]:
        width, size, aside = site.out_features, self.size, self.aside
        if width is None:
            raise UserError(f"The width of {site.name} is not known, so it takes no connected adapter.")
        found = {
            "D": P(kaiming(size, width), "direction"),
            "b": P(torch.zeros(size), "bias"),
            "R": P(torch.zeros(size, aside), "weight"),
            "U": P(torch.zeros(width, size), "direction"),
            "c": P(torch.zeros(width), "bias"),
            "W1": P(kaiming(aside, aside + size), "weight"),
            "W2": P(torch.randn(aside, aside) * 0.02, "weight"),
        }
        if site.name in self._ends[0]:
            found["P"] = P(kaiming(aside, width), "direction")
        if site.name in self._ends[1]:
            found["V"] = P(torch.zeros(width, aside), "direction")
        return found

    def around(self, t: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        h, _ = first_tensor(args, kwargs)
        result = call(*args, **kwargs)
        y: Tensor = result[0] if isinstance(result, tuple) else result
        here, f = t.cast(y.dtype), FUNCTIONS[self.function]
        before = F.linear(h, here.P) if "P" in t.meta else self._arrived(t, h)
        inside = f(F.linear(y, here.D, here.b))
        state = before + F.linear(f(F.linear(torch.cat([before, inside], -1), here.W1)), here.W2)
        y = y + F.linear(inside + F.linear(before, here.R), here.U, here.c)
        if "V" in t.meta:
            y = y + F.linear(state, here.V)
        else:
            self._send(y, state)
        return (y, *result[1:]) if isinstance(result, tuple) else y

    @property
    def _slot(self) -> str:
        return f"tw_state_{id(self)}"

    def _send(self, y: Tensor, state: Tensor) -> None:
        # On the tensor itself, so that a block which checkpointing computes again finds the state of its own input.
        # Compiled code, which cannot put attributes on tensors, runs each block once and in order.
        if torch.compiler.is_compiling():
            self._carried = state
        else:
            setattr(y, self._slot, state)

    def _arrived(self, t: Any, h: Tensor) -> Tensor:
        state = self._carried if torch.compiler.is_compiling() else getattr(h, self._slot, None)
        self._carried = None
        if state is None:
            raise UserError(
                f"The state of ConnectedAdapters did not reach {t.site_name}: what the block before it gave was made "
                "anew in between; choose the sites so that one block follows the other."
            )
        return state  # type: ignore[no-any-return]

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        width, size, aside = site.out_features or 0, self.size, self.aside
        at_ends = sum(site.name in names for names in self._ends)
        return size * (2 * width + 1 + aside) + width + aside * (2 * aside + size) + width * aside * at_ends
