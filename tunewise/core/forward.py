"""The callable that stands in for a module's forward while deltas are attached; nothing is renamed or
reclassed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunewise.sites import beside, is_quantized, read_weight, swapped

from .delta import SiteDelta, TapBuffer

__all__ = [
    "Forward",
    "Plan",
    "changed_weight",
    "first_tensor",
    "forward_of",
    "install",
    "is_quantized",
    "read_weight",
    "uninstall",
]

HEARD = "@"
"""Begins the name under which the arguments of a call are kept for a reader, not an output."""


@dataclass
class Plan:
    """Which equations run at one module, in order; rebuilt whenever the active adaptations change.

    `rows` runs in their place where the rows of a batch go through adaptations of their own: `rows(forward,
    args, kwargs)` gives the module's result, `rows.mine()` the deltas that it uses.
    """

    around: tuple[SiteDelta, ...] = ()
    inputs: tuple[SiteDelta, ...] = ()
    weights: tuple[SiteDelta, ...] = ()
    product: SiteDelta | None = None
    outputs: tuple[SiteDelta, ...] = ()
    reads: tuple[SiteDelta, ...] = ()
    taps: tuple[tuple[TapBuffer, str, bool], ...] = ()
    rows: Any = None

    def mine(self) -> tuple[SiteDelta, ...]:
        """Every delta that has an equation here."""
        product = () if self.product is None else (self.product,)
        rows = () if self.rows is None else self.rows.mine()
        return (*self.around, *self.inputs, *self.weights, *product, *self.outputs, *self.reads, *rows)

    def deltas(self) -> list[SiteDelta]:
        """Everything whose tensors are read here."""
        return [*self.mine(), *(owner for t in self.mine() for owner in t._shared)]

    def __bool__(self) -> bool:
        return bool(self.rows or self.taps or self.mine())


def changed_weight(t: SiteDelta, weight: Tensor) -> Tensor:
    """W' of the module in the module's own layout; the delta only sees `[..., out, in]` and its own rows."""
    whole = weight.transpose(-1, -2) if t.transposed else weight
    mine = whole if t.rows is None else whole.index_select(-2, t.rows)
    new = t.part.weight(t, mine.to(t.dtype)).to(weight.dtype)
    if t.rows is not None:
        new = whole.index_copy(whole.dim() - 2, t.rows, new)
    return new.transpose(-1, -2) if t.transposed else new


Put = Callable[[Tensor], tuple[tuple[Any, ...], dict[str, Any]]]


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Put]:
    """What a module is called with, and how to call it with another tensor in that place."""
    if args:
        return args[0], lambda x: ((x, *args[1:]), kwargs)
    key = next(k for k, v in kwargs.items() if isinstance(v, Tensor))
    return kwargs[key], lambda x: (args, {**kwargs, key: x})


def _count(t: SiteDelta) -> None:
    if torch.compiler.is_compiling():
        t.calls = 1  # a constant: reading it would compile anew at every call
    else:
        t.calls += 1


class Forward:
    """x -> input -> W' (or the base's own product) -> output -> read; a plain object, so copies and pickles
    work.
    """

    def __init__(self, module: nn.Module, base: Callable[..., Any]) -> None:
        self.module, self.base, self.plan = module, base, Plan()
        self.plans = [self.plan]
        self.__signature__ = inspect.signature(base)
        self.names = tuple(self.__signature__.parameters)

    def use(self, plan: Plan, alive: set[SiteDelta]) -> None:
        """Sets the plan; an earlier equal one comes back as the same object, which is what compiled code is
        bound to.
        """
        self.plans = [p for p in self.plans if p.rows is None and alive.issuperset(p.mine())]
        if plan not in self.plans:
            self.plans.append(plan)
        self.plan = next(p for p in self.plans if p == plan)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.plan:
            return self.base(*args, **kwargs)
        if not torch.compiler.is_compiling():
            offloaded = [t for t in self.plan.deltas() if "_hf_hook" in t.__dict__]
            if offloaded:
                return self._fetched(offloaded, *args, **kwargs)
        return self._around(0, *args, **kwargs)

    def _fetched(self, offloaded: list[SiteDelta], *args: Any, **kwargs: Any) -> Any:
        """accelerate has offloaded the deltas too, and brings tensors back only for calls, which deltas never
        get.
        """
        for t in offloaded:
            t.__dict__["_hf_hook"].pre_forward(t)
        try:
            return self._around(0, *args, **kwargs)
        finally:
            for t in offloaded:
                t.__dict__["_hf_hook"].post_forward(t, None)

    def _around(self, depth: int, *args: Any, **kwargs: Any) -> Any:
        if depth == len(self.plan.around):
            return self._inner(*args, **kwargs)
        t = self.plan.around[depth]
        _count(t)
        return t.part.around(t, _Next(self, depth + 1), args, kwargs)

    def _inner(self, *args: Any, **kwargs: Any) -> Any:
        plan = self.plan
        if plan.rows is not None:
            return plan.rows(self, args, kwargs)
        if not (plan.inputs or plan.weights or plan.product or plan.outputs or plan.reads or plan.taps):
            return self.base(*args, **kwargs)
        return self.run(plan, args, kwargs)

    def run(self, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's result with these equations."""
        x, put = first_tensor(args, kwargs)
        x = self.before(plan, x)
        for buffer, name, _ in plan.taps:
            if name.startswith(HEARD):
                given = {**dict(zip(self.names, args, strict=False)), **kwargs}
                buffer.calls[name.removeprefix(HEARD)] = (x, given)
        result = self._product(plan, x, *put(x))
        y: Tensor = result[0] if isinstance(result, tuple) else result
        new = self.after(plan, x, y)
        if new is y:
            return result
        return (new, *result[1:]) if isinstance(result, tuple) else new

    def before(self, plan: Plan, x: Tensor) -> Tensor:
        """What the module gets."""
        for t in plan.inputs:
            _count(t)
            x = t.share_of(t.part.input(t.cast(x.dtype), x), x)
        for buffer, name, before in plan.taps:
            if before and not name.startswith(HEARD):
                buffer.values[name] = x
        return x

    def _product(self, plan: Plan, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module, bias = self.module, self.module._parameters.get("bias")
        if plan.product is not None:
            _count(plan.product)
            return plan.product.part.product(plan.product, x, read_weight(module), bias)
        if not plan.weights:
            return self.base(*args, **kwargs)
        start = read_weight(module).to(plan.weights[0].dtype) if is_quantized(module) else None
        new: dict[str, Tensor] = {} if start is None else {"weight": start}
        for t in plan.weights:
            _count(t)
            before = new[t.parameter] if t.parameter in new else read_weight(module, t.parameter)
            new[t.parameter] = t.share_of(changed_weight(t, before), before)
        if start is not None:
            return beside(module, x, self.base(*args, **kwargs), new["weight"] - start)
        if type(module) is nn.Linear:
            return F.linear(x, new["weight"], bias)
        with swapped(module, new):
            return self.base(*args, **kwargs)

    def after(self, plan: Plan, x: Tensor, y: Tensor) -> Tensor:
        """What the module gives."""
        for t in plan.outputs:
            _count(t)
            there = x if t.buffer is None else t.buffer.take()[0]
            mine = y if t.rows is None else y.index_select(-1, t.rows)
            mine = t.share_of(t.part.output(t.cast(y.dtype), there, mine), mine)
            y = mine if t.rows is None else y.index_copy(y.dim() - 1, t.rows, mine)
        for buffer, name, before in plan.taps:
            if not before:
                buffer.values[name] = y.detach()
        for t in plan.reads:
            _count(t)
            assert t.buffer is not None
            y = t.share_of(t.part.read(t.cast(y.dtype), t.buffer.take(), y), y)
        return y


class _Next:
    """The rest of the call, handed to an `around` equation."""

    def __init__(self, forward: Forward, depth: int) -> None:
        self.forward, self.depth = forward, depth

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward._around(self.depth, *args, **kwargs)


def forward_of(module: nn.Module) -> Forward | None:
    """The installed stand-in of this module, in either slot, or None."""
    for slot in ("_old_forward", "forward"):
        found = module.__dict__.get(slot)
        if isinstance(found, Forward):
            return found
    return None


def install(module: nn.Module) -> Forward:
    """Puts the stand-in in place, inside accelerate's slot where there is one (it keeps the real forward
    there).
    """
    found = forward_of(module)
    if found is None:
        slot = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
        found = Forward(module, getattr(module, slot))
        module.__dict__[slot] = found
    return found


def uninstall(module: nn.Module) -> None:
    """Takes the stand-in away; somebody may have wrapped the module since, so both slots are looked at."""
    for slot in ("forward", "_old_forward"):
        found = module.__dict__.get(slot)
        if isinstance(found, Forward):
            own = getattr(found.base, "__func__", None) is type(module).forward
            if slot == "forward" and own:
                del module.__dict__["forward"]
            else:
                module.__dict__[slot] = found.base
