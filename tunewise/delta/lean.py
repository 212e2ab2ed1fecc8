"""SwiGLU and RMSNorm that keep for the backward pass what they are given, and nothing that follows from it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunewise.core.errors import RunError
from tunewise.core.forward import forward_of

if TYPE_CHECKING:
    from tunewise.core.run import Run

__all__ = ["RMSNorm", "SwiGLU", "lean", "lean_layers"]

PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")


def _once() -> None:
    if torch.is_grad_enabled():
        raise RunError(
            "Lean layers have no second derivative: leave the `lean` block, or attach with plain=True."
        )


class SwiGLU(torch.autograd.Function):
    """a = silu(g) * u, keeping g and u."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor) -> Tensor:
        ctx.save_for_backward(g, u)
        return F.silu(g).mul_(u)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        _once()
        g, u = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * u, g), grad * F.silu(g)


class RMSNorm(torch.autograd.Function):
    """y = w * x / rms(x), keeping x and one number per row; w is frozen. In float32 inside, as the plain layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, w, r)
        return w * (wide * r).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _once()
        x, w, r = ctx.saved_tensors
        g, unit = (grad * w).to(r.dtype), x * r
        along = (g * unit).mean(-1, keepdim=True)
        return g.sub_(unit.mul_(along)).mul_(r).to(x.dtype), None, None


class _Lean:
    """Stands in for the forward of one module; `base` is the plain way."""

    def __init__(self, module: nn.Module, base: Callable[..., Any]) -> None:
        self.module: Any = module
        self.base = base
        self.__signature__ = inspect.signature(base)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        plain = kwargs or len(args) != 1 or not torch.is_grad_enabled() or torch.compiler.is_compiling()
        return self.base(*args, **kwargs) if plain else self.lean(args[0])

    def lean(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    @classmethod
    def install(cls, module: nn.Module) -> _Lean:
        """On the module, or below what an adaptation has installed on it."""
        inner = forward_of(module)
        made = cls(module, module.forward if inner is None else inner.base)
        if inner is None:
            module.__dict__["forward"] = made
        else:
            inner.base = made
        return made

    def remove(self) -> None:
        """Somebody may have been installed above or taken away from above since."""
        inner = forward_of(self.module)
        if inner is not None and inner.base is self:
            inner.base = self.base
        elif self.module.__dict__.get("forward") is self:
            if getattr(self.base, "__func__", None) is type(self.module).forward:
                del self.module.__dict__["forward"]
            else:
                self.module.__dict__["forward"] = self.base


class _LeanNorm(_Lean):
    def lean(self, x: Tensor) -> Tensor:
        w = self.module.weight
        if w.requires_grad:
            return self.base(x)  # type: ignore[no-any-return]
        return RMSNorm.apply(x, w, _eps(self.module))  # type: ignore[no-any-return,no-untyped-call]


class _LeanMLP(_Lean):
    def lean(self, x: Tensor) -> Tensor:
        mlp = self.module
        g, u = mlp.gate_proj(x), mlp.up_proj(x)
        a: Tensor = SwiGLU.apply(g, u)  # type: ignore[no-untyped-call]
        if not a.requires_grad:
            return mlp.down_proj(a)  # type: ignore[no-any-return]
        kept = g.detach(), u.detach()

        def pack(t: Tensor) -> Any:
            """Whoever keeps a, keeps g and u, which are kept already."""
            same = t.dtype == a.dtype and t.numel() == a.numel() and t.is_contiguous()
            return t.shape if same and t.is_set_to(a.view(t.shape)) else t.detach()

        def unpack(known: Any) -> Tensor:
            return known if isinstance(known, Tensor) else F.silu(kept[0]).mul_(kept[1]).view(known)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return mlp.down_proj(a)  # type: ignore[no-any-return]


def _eps(norm: Any) -> float:
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0)))


def _kind(module: nn.Module) -> type[_Lean] | None:
    """Which stand-in may fit, by the module's parts; whether it does, is tried."""
    if "_hf_hook" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks:
        return None
    inner = forward_of(module)
    plain = module.forward if inner is None else inner.base
    if getattr(plain, "__func__", None) is not type(module).forward:  # somebody's own
        return None
    parts = {name for name in module._modules if not name.startswith("tw_")}
    if parts == set(PARTS) and not module._parameters:
        return _LeanMLP
    weight = module._parameters.get("weight")
    is_norm = not parts and set(module._parameters) == {"weight"} and _eps(module) > 0
    return _LeanNorm if is_norm and weight is not None and weight.dim() == 1 else None


def _small(module: nn.Module) -> nn.Module:
    """The same kind of module with random weights of its own, and narrow where that is possible."""
    make = torch.Generator().manual_seed(0)
    twin, own = copy.copy(module), {}
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    for name, shape in (("gate_proj", (6, 4)), ("up_proj", (6, 4)), ("down_proj", (4, 6))):
        if name in module._modules:
            layer = nn.utils.skip_init(nn.Linear, shape[1], shape[0], bias=False, dtype=dtype)
            layer.weight = nn.Parameter(torch.randn(shape, generator=make).to(dtype), requires_grad=False)
            own[name] = layer
    twin._modules = {**module._modules, **own}
    twin._parameters = {
        name: nn.Parameter(torch.randn(p.shape, generator=make).to(dtype), requires_grad=False)
        for name, p in module._parameters.items()
        if p is not None
    }
    return twin


def _same(kind: type[_Lean], module: nn.Module) -> bool:
    """Whether the lean way gives bit for bit what the module's class does, on random numbers."""
    twin: Any = _small(module)
    width = 4 if kind is _LeanMLP else len(twin.weight)
    dtype = next(twin.parameters()).dtype
    x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        plain, found = type(module).forward(twin, x), kind(twin, twin.forward).lean(x)
    return isinstance(plain, Tensor) and plain.dtype == found.dtype and torch.equal(plain, found)


@contextmanager
def lean(model: nn.Module) -> Iterator[int]:
    """Inside, SwiGLU layers keep gate and up alone and frozen RMS norms x alone; yields how many layers do.

    silu(g), silu(g) * u and the steps of a norm are computed again in the backward pass, whatever delta sits on
    the projections. A layer takes part if its class gives bit for bit the same on random numbers. Not
    together with gradient checkpointing, which would keep what is kept here. Nothing is renamed or reclassed, and
    on leaving the block every module is what it was.
    """
    installed: list[_Lean] = []
    try:
        for module in model.modules():
            kind = _kind(module)
            if kind is not None and _same(kind, module):
                installed.append(kind.install(module))
        yield len(installed)
    finally:
        for one in reversed(installed):
            one.remove()


def lean_layers(run: Run) -> AbstractContextManager[int]:
    """`lean` for the time of a run, where its parts and settings allow it."""
    kept = run.handle.plain or getattr(run.settings, "gradient_checkpointing", False)
    return nullcontext(0) if kept else lean(run.model)
