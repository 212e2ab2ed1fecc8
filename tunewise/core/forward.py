"""The callable that stands in for a module's forward while deltas are attached; nothing is renamed or
reclassed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .delta import SiteDelta, TapBuffer

__all__ = [
    "Forward",
    "Plan",
    "changed_weight",
    "forward_of",
    "install",
    "is_quantized",
    "read_weight",
    "swapped",
    "uninstall",
]


@dataclass
class Plan:
    """Which equations run at one module, in order; rebuilt whenever the active adaptations change."""

    around: tuple[SiteDelta, ...] = ()
    inputs: tuple[SiteDelta, ...] = ()
    weights: tuple[SiteDelta, ...] = ()
    product: SiteDelta | None = None
    outputs: tuple[SiteDelta, ...] = ()
    reads: tuple[SiteDelta, ...] = ()
    taps: tuple[tuple[TapBuffer, str, bool], ...] = ()

    def mine(self) -> tuple[SiteDelta, ...]:
        """Every delta that has an equation here."""
        product = () if self.product is None else (self.product,)
        return (*self.around, *self.inputs, *self.weights, *product, *self.outputs, *self.reads)

    def deltas(self) -> list[SiteDelta]:
        """Everything whose tensors are read here."""
        return [*self.mine(), *(owner for t in self.mine() for owner in t._shared)]

    def __bool__(self) -> bool:
        return any(
            (self.around, self.inputs, self.weights, self.product, self.outputs, self.reads, self.taps)
        )


def is_quantized(module: nn.Module) -> bool:
    """Whether the module's weight is kept as integer codes (bitsandbytes, torchao)."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return False
    if type(weight) in (nn.Parameter, Tensor):  # answered first: compilers break their graph at what follows
        return not weight.is_floating_point()
    return (
        not weight.is_floating_point()
        or hasattr(weight, "quant_state")
        or hasattr(weight, "dequantize_tensor")
        or (type(weight).__module__.startswith("torchao"))
    )


def read_weight(module: nn.Module, parameter: str = "weight") -> Tensor:
    """The weight as real numbers, never as integer codes."""
    weight: Any = getattr(module, parameter)
    if not is_quantized(module):
        return weight  # type: ignore[no-any-return]
    if type(weight).__module__.startswith("torchao"):
        return weight.dequantize()  # type: ignore[no-any-return]
    from bitsandbytes import functional  # type: ignore[import-not-found,unused-ignore]

    if getattr(weight, "quant_state", None) is not None:
        return functional.dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[no-any-return,unused-ignore]
    holder: Any = weight if getattr(weight, "SCB", None) is not None else module.state
    codes, scale = holder.CB, holder.SCB
    return functional.int8_vectorwise_dequant(codes, scale)  # type: ignore[no-any-return]


def changed_weight(t: SiteDelta, weight: Tensor) -> Tensor:
    """W' of the module in the module's own layout; the delta only sees `[..., out, in]` and its own rows."""
    whole = weight.transpose(-1, -2) if t.transposed else weight
    mine = whole if t.rows is None else whole.index_select(-2, t.rows)
    new = t.part.weight(t, mine.to(t.dtype)).to(weight.dtype)
    if t.rows is not None:
        new = whole.index_copy(whole.dim() - 2, t.rows, new)
    return new.transpose(-1, -2) if t.transposed else new


@contextmanager
def swapped(module: nn.Module, new: dict[str, Tensor]) -> Iterator[None]:
    """The module with other tensors in the place of its parameters."""
    saved = {name: module._parameters[name] for name in new}
    module._parameters.update(new)  # type: ignore[arg-type]
    try:
        yield
    finally:
        module._parameters.update(saved)


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

    def use(self, plan: Plan, alive: set[SiteDelta]) -> None:
        """Sets the plan; an earlier equal one comes back as the same object, which is what compiled code is
        bound to.
        """
        self.plans = [p for p in self.plans if alive.issuperset(p.mine())]
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
        if not (plan.inputs or plan.weights or plan.product or plan.outputs or plan.reads or plan.taps):
            return self.base(*args, **kwargs)
        key = None if args else next(k for k, v in kwargs.items() if isinstance(v, Tensor))
        x: Tensor = args[0] if key is None else kwargs[key]
        for t in plan.inputs:
            _count(t)
            x = t.part.input(t.cast(x.dtype), x)
        args, kwargs = ((x, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: x})
        for buffer, name, before in plan.taps:
            if before:
                buffer.values[name] = x
        result = self._product(x, args, kwargs)
        y: Tensor = result[0] if isinstance(result, tuple) else result
        new = self._after(x, y)
        if new is y:
            return result
        return (new, *result[1:]) if isinstance(result, tuple) else new

    def _product(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module, plan, bias = self.module, self.plan, self.module._parameters.get("bias")
        if plan.product is not None:
            _count(plan.product)
            return plan.product.part.product(plan.product, x, read_weight(module), bias)
        if not plan.weights:
            return self.base(*args, **kwargs)
        new: dict[str, Tensor] = {}
        for t in plan.weights:
            _count(t)
            before = new[t.parameter] if t.parameter in new else read_weight(module, t.parameter)
            new[t.parameter] = changed_weight(t, before)
        if "weight" in new and (type(module) is nn.Linear or is_quantized(module)):
            return F.linear(x, new["weight"].to(x.dtype) if is_quantized(module) else new["weight"], bias)
        with swapped(module, new):
            return self.base(*args, **kwargs)

    def _after(self, x: Tensor, y: Tensor) -> Tensor:
        for t in self.plan.outputs:
            _count(t)
            there = x if t.buffer is None else t.buffer.take()[0]
            mine = y if t.rows is None else y.index_select(-1, t.rows)
            mine = t.part.output(t.cast(y.dtype), there, mine)
            y = mine if t.rows is None else y.index_copy(y.dim() - 1, t.rows, mine)
        for buffer, name, before in self.plan.taps:
            if not before:
                buffer.values[name] = y.detach()
        for t in self.plan.reads:
            _count(t)
            assert t.buffer is not None
            y = t.part.read(t.cast(y.dtype), t.buffer.take(), y)
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
