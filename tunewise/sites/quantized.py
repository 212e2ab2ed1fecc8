"""Weights that are kept as integer codes (bitsandbytes, torchao): read as real numbers, written in their own scheme."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tunewise.core.errors import UserError

from .modules import swapped

__all__ = ["beside", "dequantized", "is_quantized", "put_weight", "read_weight", "rounded", "rounding_errors"]


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
        return functional.dequantize_4bit(*_four_bits(weight))  # type: ignore[no-any-return,unused-ignore]
    holder: Any = weight if getattr(weight, "SCB", None) is not None else module.state
    codes, scale = holder.CB, holder.SCB
    return functional.int8_vectorwise_dequant(codes, scale)  # type: ignore[no-any-return]


def _four_bits(weight: Any) -> tuple[Tensor, Any]:
    """Codes and their scales in bitsandbytes' plain order, which its fast CPU product gives up for good."""
    state = weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        return weight.data, state
    from bitsandbytes import functional

    state = copy.copy(state)
    state.original_nested = False  # its inverse would round the scales a second time
    codes, state = functional._convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax = state.absmax.T.reshape(-1).float()
    return codes, state


def rounded(
    module: nn.Module, name: str, new: Tensor, allowed: bool = True
) -> tuple[nn.Parameter, tuple[float, float]]:
    """`new` `[out, in]` in the scheme of the module's own weight W, and (|rounded - new|, |new - W|).

    The module stays as it is: `put_weight` puts the parameter in its place. A matrix that is W already keeps
    its codes. Raises `UserError` for a scheme that Tunewise cannot write, and unless it is `allowed`.
    """
    if not allowed:
        raise UserError(
            f"{name} is quantized: merging would lose precision; load the base model unquantized, or "
            "call merge(quantized=True), which rounds anew and says what that costs."
        )
    change = float((new - read_weight(module)).norm())
    made = _requantized(module, new) if change else module._parameters["weight"]
    if made is None:
        raise UserError(
            f"{name} keeps its weight as {type(module.weight).__name__}, in a scheme that Tunewise cannot write: "
            "load the base model unquantized."
        )
    old = put_weight(module, made)
    error = float((read_weight(module) - new).norm()) if change else 0.0
    put_weight(module, old)
    return made, (error, change)


def _requantized(module: nn.Module, new: Tensor) -> nn.Parameter | None:
    weight: Any = module.weight
    kind = type(weight).__name__
    if kind == "Params4bit":
        state = weight.quant_state
        made = type(weight)(
            new.to(getattr(state, "original_dtype", state.dtype)),
            requires_grad=False,
            blocksize=weight.blocksize,
            compress_statistics=weight.compress_statistics,
            quant_type=weight.quant_type,
            quant_storage=weight.quant_storage,
        )
        return made.to(new.device)  # type: ignore[no-any-return]
    if kind == "Int8Params":  # quantizes on its way from the CPU
        return type(weight)(new.cpu(), requires_grad=False).to(new.device)  # type: ignore[no-any-return]
    if kind == "Int8Tensor" and weight.act_pre_scale is None and weight.act_quant_scale is None:
        return _torchao(weight, new)
    return None


def _torchao(weight: Any, new: Tensor) -> nn.Parameter | None:
    from torchao.quantization import PerRow, PerTensor  # type: ignore[import-not-found,unused-ignore]

    rows, columns = weight.shape
    grain = {(1, columns): PerRow(), (rows, columns): PerTensor()}.get(tuple(weight.block_size))
    if grain is None or (weight.zero_point is not None and bool(weight.zero_point.any())):
        return None
    reduced = bool(weight.reduce_range)
    made = type(weight).from_hp(
        new.to(weight.dtype), grain, act_quant_kwargs=weight.act_quant_kwargs, reduce_range=reduced
    )
    return nn.Parameter(made, requires_grad=False)


def rounding_errors(lost: dict[str, tuple[float, float]]) -> dict[str, float]:
    """{site: |rounded - W'| / |W' - W|} of what `rounded` lost, and over all sites under ""."""
    pooled = [sum(part**2 for part in parts) ** 0.5 for parts in zip(*lost.values(), strict=True)]
    each = {site: error / (change or 1.0) for site, (error, change) in lost.items()}
    return each | ({"": pooled[0] / (pooled[1] or 1.0)} if pooled else {})


@contextmanager
def dequantized(module: nn.Module) -> Iterator[None]:
    """The module with real numbers in the place of its codes, for whoever reads its weight."""
    codes = {"weight": read_weight(module)} if is_quantized(module) else {}
    with swapped(module, codes):
        yield


def beside(module: nn.Module, x: Tensor, y: Tensor, change: Tensor) -> Tensor:
    """y + dW x: what a change adds beside a quantized layer's own product y, so that a change of 0 is the base."""
    more = F.embedding(x, change) if isinstance(module, nn.Embedding) else F.linear(x, change.to(x.dtype))
    return y + more.to(y.dtype)


def put_weight(module: nn.Module, new: nn.Parameter) -> nn.Parameter:
    """Exchanges the quantized weight together with the scales that its layer keeps outside it; gives the old one."""
    old: Any = module._parameters["weight"]
    state: Any = getattr(module, "state", None)
    if type(old).__name__ == "Int8Params" and old.CB is None:  # taken over by the layer at its first call
        old.CB, old.SCB = state.CB, state.SCB
    module._parameters["weight"] = new
    if getattr(new, "quant_state", None) is not None and hasattr(module, "quant_state"):
        module.quant_state = new.quant_state  # type: ignore[attr-defined]
    return old  # type: ignore[no-any-return]
