"""y' = network(h_0 .. h_L, y): the frame of all side networks, and the simplest of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from tunewise.core.delta import Delta, P, forms
from tunewise.core.errors import UserError
from tunewise.sites import Site

from .side_context import Context

__all__ = ["Ladder", "Side", "default_linear"]

END = "end"
GAIN = 3**-0.5
"""Of torch's own start."""
_numbers = count()


class Side(Delta):
    """y' = network(t, h, y, context): what stands beside a frozen backbone and reads its states.

    h are the detached outputs `[rows, length, width]` of the blocks in `taps`, in order; y is what the place in
    `sites` gives: "end" is the norm behind the last block (decoders, ViT), else the last block itself (BERT).
    `context` holds h_0 (what the first block gets), the mask, rotary angles and the cache; side networks that need
    none of that set `attends = False`. Taps, h_0 and mask are all that is taken from the backbone, so nothing is sent
    back through it, what autograd keeps does not grow with its depth, and frozen states can be served from a store.
    A subclass gives `start(site, taps)`, its tensors, and `network`; `in_place` says that y' leaves y out, so that
    nothing before it in the backbone can learn beside it. Raises `UserError` for widths that are not known, for taps
    in two stacks (an encoder-decoder): name one, `taps="decoder"`, and for recipes that train what cannot learn.
    """

    kinds: ClassVar[tuple[str, ...]] = ("block", "norm")
    gives: ClassVar[frozenset[str]] = frozenset({"frozen_backbone"})
    attends: ClassVar[bool] = True
    tap_kinds: ClassVar[tuple[str, ...]] = ("block",)
    taps: str = "block"  # type: ignore[misc]
    sites: str | list[str] = END

    @property
    def in_place(self) -> bool:
        """Whether y' is the network's alone."""
        return False

    def attached(self, adaptation: Any) -> None:
        lost = _unheard(adaptation, self) if self.in_place else None
        if lost is not None:
            raise UserError(
                f"{lost} would never learn: {type(self).__name__} answers in the place of the backbone and sends "
                "nothing back through it; train them one after the other, or take a side network that adds to the "
                "backbone's answer: ladder, qst or unipt."
            )

    def chosen(self, everything: Sequence[Site]) -> list[Site]:
        if self.sites != END:
            found = super().chosen(everything)
            return [s for s in found if s.kind == "block"] or found  # layers[-1] is a block and what it holds
        blocks = [s for s in everything if s.kind == "block"]
        if not blocks:
            raise UserError(
                f"The model has no repeated blocks that {type(self).__name__} could stand beside."
            )
        last = blocks[-1].name
        after = everything[everything.index(blocks[-1]) :]
        norms = [s for s in after if s.kind == "norm" and s.layer is None and _around(s.name, last)]
        return norms[-1:] or blocks[-1:]

    def listens(self, everything: Sequence[Site], taps: Sequence[Site]) -> dict[str, nn.Module]:
        if not self.attends:
            return {}
        stack = taps[0].stack
        first = next(s.module for s in everything if s.kind == "block" and s.stack == stack)
        self.__dict__["causal"] = any(getattr(m, "is_causal", False) is True for m in first.modules())
        return {"block": first}

    def side_tensors(self, site: Site, taps: Sequence[Site]) -> dict[str, P]:
        name = type(self).__name__
        if site.out_features is None or any(tap.out_features is None for tap in taps):
            raise UserError(f"The width of {site.name} is not known, so {name} cannot be sized.")
        if len({tap.stack for tap in taps}) > 1:
            raise UserError(f'{name} reads one stack of blocks; choose one, for example taps="decoder".')
        self.__dict__["number"] = next(_numbers)
        return self.start(site, taps)

    def start(self, site: Site, taps: Sequence[Site]) -> dict[str, P]:
        """The tensors that it starts with; all widths are known."""
        raise NotImplementedError

    def read(self, t: Any, taps: list[Tensor], y: Tensor) -> Tensor:
        h = [tap.to(y.dtype) for tap in taps]
        if not self.attends:
            return self.network(t, h, y, None)
        calls, t.buffer.calls = t.buffer.calls, {}
        return self.network(t, h, y, Context.of(t, calls, y))

    def network(self, t: Any, h: list[Tensor], y: Tensor, context: Any) -> Tensor:
        """y'."""
        raise NotImplementedError


def _around(name: str, inner: str) -> bool:
    """Whether the module that holds `name` holds `inner` too."""
    owner = name.rpartition(".")[0]
    return not owner or inner.startswith(owner + ".")


def _unheard(adaptation: Any, part: Side) -> str | None:
    """The first trained thing whose effect ends where `part` answers: inside that module or before it."""
    order = {module: i for i, module in enumerate(adaptation.model.modules())}
    mine = next(i for i, (_, _, t) in enumerate(adaptation.sites) if t.part is part)
    end = adaptation.sites[mine][1].module
    inside = set(end.modules())

    def before(module: nn.Module) -> bool:
        return order[module] < order[end] or module in inside

    for i, (_, site, t) in enumerate(adaptation.sites):
        read_later = site.module is end and "read" in forms(t.part) and i > mine
        if t.part.slot == "delta" and i != mine and before(site.module) and not read_later:
            return f"{type(t.part).__name__} at {site.name or 'the input'}"
    for name, found in adaptation.existing.items():
        if found.part.slot == "delta" and all(before(module) for module, _ in found.places):
            return f"{name} ({type(found.part).__name__})"
    return None


def default_linear(outs: int, ins: int, bias: bool = True, gain: float = GAIN) -> tuple[Tensor, Tensor]:
    """(W `[outs, ins]`, b `[outs]`) as torch starts a linear layer, but W x is `gain` times as large as x."""
    layer = nn.Linear(ins, outs, bias)
    weight = layer.weight.detach() * (gain / GAIN)
    return weight, layer.bias.detach() if bias else torch.zeros(outs)


class Ladder(Side):
    """y' = y + Up(s_L), s_i = s + W2_i gelu(W1_i norm(s)), s = mu_i s_{i-1} + (1 - mu_i) D_i h_i, mu_i =
    sigmoid(a_i / T).

    D_i `[width / reduction, width]`, a_i start at 0 (mu = 0.5), T = 0.1. Simpler than LST (arXiv 2206.06522): the side
    blocks are feed-forward without attention and start at random instead of from pruned backbone weights; Up starts
    at 0 and is added to what stands there, so step 0 is the base model.
    """

    attends: ClassVar[bool] = False
    reduction: PositiveInt = 8
    temperature: PositiveFloat = 0.1
    sites: str | list[str] = "layers[-1]"

    def start(self, site: Site, taps: Sequence[Site]) -> dict[str, P]:
        width = site.out_features or 1
        d, found = max(width // self.reduction, 1), {}
        for i, tap in enumerate(taps):
            found[f"D{i}"] = P(default_linear(d, tap.out_features or 1, bias=False)[0], "direction")
            found[f"W1_{i}"] = P(default_linear(2 * d, d, bias=False)[0], "weight")
            found[f"W2_{i}"] = P(torch.zeros(d, 2 * d), "weight")
        if len(taps) > 1:  # the first tap has nothing before it to be mixed with
            found["a"] = P(torch.zeros(len(taps) - 1), "gate")
        found["up"] = P(torch.zeros(width, d), "direction")
        return found

    def network(self, t: Any, h: list[Tensor], y: Tensor, context: Any) -> Tensor:
        mu = torch.sigmoid(t.a / self.temperature) if len(h) > 1 else None
        s: Tensor | None = None
        for i, tap in enumerate(h):
            low = F.linear(tap, getattr(t, f"D{i}"))
            s = low if s is None or mu is None else mu[i - 1] * s + (1 - mu[i - 1]) * low
            inner = F.gelu(F.linear(F.layer_norm(s, s.shape[-1:]), getattr(t, f"W1_{i}")))
            s = s + F.linear(inner, getattr(t, f"W2_{i}"))
        assert s is not None
        return y + F.linear(s, t.up)

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        width = site.out_features or 0
        d = max(width // self.reduction, 1)
        return sum(d * (tap.out_features or 0) + 4 * d * d + 1 for tap in taps) - 1 + d * width
