"""block(P; keys and values of X): what a block of an encoder makes of other rows that read the attention of X."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunewise.core.errors import UserError
from tunewise.core.forward import first_tensor
from tunewise.sites import find_sites

from .attention import attending_module

__all__ = ["Attention", "ask", "attention_of"]

NAME = "tw_query"


class Attention(NamedTuple):
    """Names, below a block, of what calls the attention function, and of its key and value layers if it has no more."""

    name: str
    key: str | None = None
    value: str | None = None


class Heard(Exception):
    """What was listened for has come; the rest of the block is not needed."""


class Asked:
    """What one attention is asked with: K and V of X, or what it gets of X and the layers that make K and V of it."""

    def __init__(self, before: str, mask: Tensor | None, layers: list[nn.Linear]) -> None:
        self.before, self.mask, self.layers = before, mask, layers
        self.held: tuple[Tensor, Tensor] | None = None
        self.read: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """In the place of the attention's own, for one call."""
        self.read, _ = first_tensor(args, kwargs)
        raise Heard


def ask(block: nn.Module, attention: Attention, prompt: Tensor, x: Tensor, given: dict[str, Any]) -> Tensor:
    """What the block makes of `prompt` `[rows, queries, width]` when its attention reads x `[rows, length, width]`.

    The block runs on x up to its attention for the sake of K and V. With plain linear layers K = X W_k^T + b_k and
    V = X W_v^T + b_v the attention is softmax((q W_k) X^T) X W_v^T + b_v, for b_k moves all scores of a query alike;
    few queries are asked like this, and X is not projected. Raises `UserError` for attention that is rotated by
    position or that transformers' interface does not reach.
    """
    owner: Any = block.get_submodule(attention.name)
    forward = type(block).forward  # what is attached to the block as a whole is about x
    first, *names = list(inspect.signature(forward).parameters)[1:]
    if given.get("position_embeddings") is not None:
        raise UserError(f"VisualQueries: the attention of {type(block).__name__} is rotated by position.")
    mask = given.get("attention_mask")
    rest = {k: v for k, v in given.items() if k != first and (k in names or "kwargs" in names)}
    mask = mask[..., -1:, :] if isinstance(mask, Tensor) else None
    asked = Asked(owner.config._attn_implementation, mask, _layers(block, attention))
    _register()
    owner.config._attn_implementation, owner.__dict__["tw_asked"] = NAME, asked
    learns = x.requires_grad or any(p.requires_grad for p in block.parameters())
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns), suppress(Heard):
            _listen(owner, asked, lambda: forward(block, x, **rest))
        if asked.held is None and asked.read is None:
            raise UserError(f"VisualQueries: the attention of {type(block).__name__} cannot be listened to.")
        result = forward(block, prompt, **rest)
    finally:
        owner.config._attn_implementation = asked.before
        del owner.__dict__["tw_asked"]
    return result[0] if isinstance(result, tuple) else result  # type: ignore[no-any-return]


def attention_of(block: nn.Module, where: str) -> Attention:
    """The attention of a block; its key and value layers are named if it consists of linear ones alone."""
    owner = attending_module(block, where)
    name = next(n for n, module in block.named_modules() if module is owner)
    found = {s.role: s.name for s in find_sites(owner) if s.kind == "linear"}
    linear = all(type(m) is nn.Linear for m in owner.modules() if m is not owner and m._parameters)
    if not linear or owner._parameters or not {"query", "key", "value"} <= found.keys():
        return Attention(name)
    return Attention(name, f"{name}.{found['key']}", f"{name}.{found['value']}")


def _layers(block: nn.Module, attention: Attention) -> list[nn.Linear]:
    """Key and value layer, where the input of the attention is enough to hear."""
    names = [n for n in attention[1:] if n]
    touched = "forward" in block.get_submodule(attention.name).__dict__
    return [] if touched else [block.get_submodule(n) for n in names]  # type: ignore[misc]


def _listen(owner: nn.Module, asked: Asked, call: Callable[[], Any]) -> None:
    """Runs the block up to its attention, or up to the attention function if that is all that is known of it."""
    if not asked.layers:
        call()
        return
    owner.__dict__["forward"] = asked.forward
    try:
        call()
    finally:
        del owner.__dict__["forward"]


def queried_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """The model's own attention with keys and values of X; before it has them, it holds its own as these."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    asked: Asked = module.__dict__["tw_asked"]
    if asked.held is None and asked.read is None:
        asked.held = key, value
        raise Heard
    if asked.read is not None:
        few = 2 * query.shape[2] <= asked.read.shape[1]
        wide = query.shape[1] * query.shape[3]
        plain = all(
            type(m) is nn.Linear and "forward" not in m.__dict__ and len(m.weight) == wide
            for m in asked.layers
        )
        if few and plain and not options.get("dropout"):
            return _folded(query, asked, options.get("scaling")), None
        shape = (*asked.read.shape[:2], -1, query.shape[3])
        key, value = (layer(asked.read).view(shape).transpose(1, 2) for layer in asked.layers)
    elif asked.held is not None:
        key, value = asked.held
    options["is_causal"] = False
    function = ALL_ATTENTION_FUNCTIONS[asked.before if asked.before in ALL_ATTENTION_FUNCTIONS else "sdpa"]
    return function(module, query, key, value, asked.mask, **options)  # type: ignore[no-any-return]


def _folded(query: Tensor, asked: Asked, scale: float | None) -> Tensor:
    """softmax(scale (q W_k) X^T) X W_v^T + b_v per head, all heads' queries as those of one; query `[rows, heads,
    queries, size]`, the result `[rows, queries, heads, size]`.
    """
    rows, heads, count, size = query.shape
    x, (key, value) = asked.read, asked.layers
    assert x is not None
    folded = torch.einsum("bhqs,hsd->bhqd", query, key.weight.view(heads, size, -1)).flatten(1, 2)
    found = F.scaled_dot_product_attention(
        folded.unsqueeze(1), x.unsqueeze(1), x.unsqueeze(1), asked.mask, scale=scale or size**-0.5
    ).view(rows, heads, count, -1)
    found = torch.einsum("bhqd,hsd->bqhs", found, value.weight.view(heads, size, -1))
    return found if value.bias is None else found + value.bias.view(heads, size)


def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, queried_attention)
