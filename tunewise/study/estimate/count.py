"""Counts what a computation does without doing it: operations with their shapes, and the peak of live memory."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["Counter", "Work", "bytes_of", "fake_copy", "fake_mode"]

FACTORIES = frozenset(
    [
        "zeros",
        "ones",
        "full",
        "empty",
        "rand",
        "randn",
        "normal",
        "arange",
        "scalar_tensor",
        "linspace",
        "eye",
    ]
)


@dataclass(frozen=True)
class Shape:
    """A tensor without its values."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Call:
    """One operation with the shapes of its arguments; equal calls take equal time."""

    func: Any
    leaves: tuple[Any, ...]
    spec: Any = field(compare=False)
    flops: int = field(default=0, compare=False)
    bytes: int = field(default=0, compare=False)


@dataclass
class Work:
    """How often each call was made, and the floating-point operations of the matrix products among them."""

    calls: dict[Call, int] = field(default_factory=dict)
    flops: float = 0.0


def fake_mode() -> FakeTensorMode:
    """A world of tensors with shapes and devices but without values; real tensors may take part."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_copy(model: nn.Module, mode: FakeTensorMode, device: torch.device) -> nn.Module:
    """The model with every parameter and buffer replaced by one without values on `device`; shared ones stay
    shared.
    """
    memo: dict[int, Any] = {}
    with mode:
        for p in model.parameters():
            made = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device=device)
            memo[id(p)] = nn.Parameter(made, p.requires_grad)
        for b in model.buffers():
            memo[id(b)] = torch.empty_strided(b.shape, b.stride(), dtype=b.dtype, device=device)
    return copy.deepcopy(model, memo)


def bytes_of(tensors: Iterator[Tensor] | list[Tensor]) -> int:
    """Bytes of these tensors' memory, shared memory counted once."""
    found = {id(s): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    return sum(found.values())


class Counter(TorchDispatchMode):
    """Within it, operations on tensors without values are counted; values of integers and masks stay real.

    live   bytes of all memory that was made inside and is still referred to; `peak` its highest value
    Numbers that a computation asks for and that do not exist (a loss) are answered with 1.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode, self.work = mode, Work()
        self.live, self.peak = 0, 0
        self._known: Any = WeakIdKeyDictionary()

    def restart(self) -> None:
        """Counts from here on; what lives now goes on living."""
        self.work, self.peak = Work(), self.live

    def ignore(self, tensors: Iterator[Tensor] | list[Tensor]) -> None:
        """Memory that was there before."""
        for tensor in tensors:
            self._known[tensor.untyped_storage()] = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._overloadpacket.__name__
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        fake = any(isinstance(x, FakeTensor) for x in inputs)
        if fake and name == "_local_scalar_dense":
            return 1.0 if inputs[0].is_floating_point() else 1
        if fake and name in ("index", "masked_select"):
            args = self._chosen(name, args)
            func = torch.ops.aten.index.Tensor
        elif fake and name == "index_put_":
            args = (*self._chosen(name, args), *args[2:])
        if not inputs and name in FACTORIES and _floating(kwargs):
            with self.mode:
                out = func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        for tensor in outputs:
            self._track(tensor)
        self._add(func, name, args, kwargs, inputs, out)
        return out

    def _chosen(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Which elements a real mask chooses is known, so the shape of the result is."""
        given = [args[1]] if name == "masked_select" else list(args[1])
        indices: list[Any] = []
        for index in given:
            if isinstance(index, Tensor) and index.dtype is torch.bool and not isinstance(index, FakeTensor):
                indices += index.nonzero(as_tuple=True)
            else:
                indices.append(index)
        return (args[0], indices)

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, size).atexit = False

    def _drop(self, size: int) -> None:
        self.live -= size

    def _add(
        self, func: Any, name: str, args: Any, kwargs: Mapping[str, Any], inputs: list[Tensor], out: Any
    ) -> None:
        packet, flops = func._overloadpacket, 0
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=out)
        elif "scaled_dot_product" in name:
            flops = _attention(name, inputs)
        touched = [*inputs, *(x for x in tree_leaves(out) if isinstance(x, Tensor))]
        size = 0 if func.is_view else sum(x.untyped_storage().nbytes() for x in touched)
        leaves, spec = tree_flatten((args, dict(kwargs)))
        call = Call(func, tuple(_described(leaf) for leaf in leaves), spec, flops, size)
        self.work.flops += flops
        self.work.calls[call] = self.work.calls.get(call, 0) + 1


def _floating(kwargs: Mapping[str, Any]) -> bool:
    dtype = kwargs.get("dtype")
    return dtype is None or dtype.is_floating_point


def _described(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return Shape(tuple(leaf.shape), tuple(leaf.stride()), leaf.dtype, leaf.device)


def _attention(name: str, inputs: list[Tensor]) -> int:
    """Two products forward, five backward."""
    backward = "backward" in name
    q, k = inputs[1:3] if backward else inputs[:2]
    once = 2 * prod(q.shape) * k.shape[-2]
    return once * (5 if backward else 2)
