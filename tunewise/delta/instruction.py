"""Which tokens are the instruction: what prompts may depend on, so that answers can be made one token at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tunewise.core.adaptation import handles
from tunewise.core.delta import Delta, P
from tunewise.core.errors import UserError
from tunewise.core.forward import forward_of
from tunewise.sites import Site

__all__ = ["Instruction", "argument", "keep_prompts", "kept_prompts", "readable"]

KEPT = "tw_prompts"


def argument(t: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An argument of the call of t's module by its name, or None."""
    if name in kwargs:
        return kwargs[name]
    names = forward_of(t.root).names  # type: ignore[union-attr]
    return args[names.index(name)] if name in names[: len(args)] else None


class Instruction(Delta):
    """mask `[rows, tokens]` of the tokens that generated prompts may read; changes nothing by itself.

    They are the tokens that are no padding. In a causal language model they end before the first supervised
    token of the row (a label that is not -100, given to the model or by the run), and under `generate` with the
    prompt: prompts stay as they are while the answer grows. Without labels all tokens are read, and while
    training a warning says so. Raises `UserError` for `generate` without a cache, where answers cannot be told
    from instructions, and for encoder-decoder models.
    """

    kinds: ClassVar[tuple[str, ...]] = ("model",)

    def tensors(self, site: Site) -> dict[str, P]:
        model: Any = site.module
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise UserError(
                f"Generated prompts do not work in {type(model).__name__}: an encoder-decoder has two sequences."
            )
        writes = getattr(model, "get_output_embeddings", lambda: None)() is not None
        causal = any(bool(getattr(m, "is_causal", False)) for m in model.modules())
        self.__dict__["_answers"] = writes and causal
        return {}

    def around(self, t: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cache = argument(t, "past_key_values", args, kwargs)
        goes_on = cache is not None and cache.get_seq_length() > 0
        mask = None if goes_on else self._mask(t, args, kwargs)
        for handle in handles(t.root).values():
            for owner in handle.owned.values():
                owner.reading = (mask, goes_on)
        return call(*args, **kwargs)

    def _mask(self, t: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        mask = argument(t, "attention_mask", args, kwargs)
        real = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        if not self.__dict__.get("_answers"):
            return real
        labels = self._labels(t, kwargs)
        if labels is None:
            if kwargs.get("use_cache") is False and not t.training:
                raise UserError(
                    "Generated prompts depend on the instruction alone, and without a cache answers cannot be told "
                    "from it: leave use_cache on, or give labels."
                )
            if t.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
                warnings.warn("No labels were given: prompts are generated from all tokens.", stacklevel=2)
            return real
        before = (labels != -100).cumsum(1) == 0
        return before if real is None else before & real[:, -before.shape[1] :]

    @staticmethod
    def _labels(t: Any, kwargs: dict[str, Any]) -> Tensor | None:
        labels = kwargs.get("labels")
        for handle in handles(t.root).values():
            batch = None if handle.run is None else handle.run.reads
            labels = batch.labels if labels is None and batch is not None else labels
        return labels if isinstance(labels, Tensor) and labels.dim() == 2 else None


def _reading(t: Any) -> tuple[Tensor | None, bool]:
    owner: Any = t.shared
    if getattr(owner, "reading", None) is None:
        raise UserError(f"{type(t.part).__name__} needs Instruction() in the same recipe.")
    return owner.reading  # type: ignore[no-any-return]


def readable(t: Any, hidden: Tensor) -> Tensor | None:
    """The mask for these states, `[rows, tokens]`; tokens that others put in front are no part of the text.

    None means that all are read. Raises `UserError` without `Instruction()` in the recipe.
    """
    mask, _ = _reading(t)
    if mask is None:
        return None
    mask = nn.functional.pad(mask, (hidden.shape[1] - mask.shape[1], 0))
    return mask | ~mask.any(1, keepdim=True)


def kept_prompts(cache: Any, t: Any) -> Any:
    """What `keep_prompts` left with this cache for `t`; None where the instruction is to be read in this pass.

    Raises `UserError` for a cache that was filled without the prompts.
    """
    if not _reading(t)[1]:
        return None
    found = getattr(cache, KEPT, {}).get(id(t))
    if found is None:
        raise UserError(
            f"{type(t.part).__name__}: the cache was filled without its prompts; run the instruction through "
            "the adapted model first."
        )
    return found


def keep_prompts(cache: Any, t: Any, value: Any) -> None:
    """Leaves what was made of the instruction with the cache, for the tokens that come after it."""
    if cache is not None:
        if not hasattr(cache, KEPT):
            setattr(cache, KEPT, {})
        getattr(cache, KEPT)[id(t)] = value
