"""What a side network takes from the pass of the backbone beside the taps: h_0, who sees whom, angles, the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunewise.core.errors import UserError

__all__ = ["Context", "spaced"]

Angles = tuple[Tensor, Tensor]


@dataclass
class Context:
    """h_0 `[rows, length, width]` and what attention beside the backbone needs.

    seen    bool `[rows, 1, length, keys]` or smaller, True where a position may look; None: everywhere it comes to
    causal  without `seen`: positions look at themselves and at earlier ones
    angles  (cos, sin) `[rows, length, pairs]` of the backbone's rotary embedding, None where it has none
    cache   the backbone's own cache, to which side networks append layers of their own; None: nothing is kept
    raw     the token ids `[rows, length]`, for networks that listen to the embedding
    """

    h0: Tensor
    seen: Tensor | None
    causal: bool
    angles: Angles | None
    cache: Any = None
    owner: int = 0
    raw: Tensor | None = None
    taken: int = 0

    @classmethod
    def of(cls, t: Any, calls: dict[str, Any], y: Tensor) -> Context:
        """The context of this pass, from what the first block was called with."""
        name = type(t.part).__name__
        if "block" not in calls:
            raise UserError(f"{name} listens to the first block, which was not called in this forward.")
        x, given = calls["block"]
        length = x.shape[1]
        cache = _cache(given, length, t.training, name)
        facts = t.part.__dict__  # found when it was attached
        causal = facts["causal"]
        mask = given.get("attention_mask")
        seen = _seen(mask, length, causal) if isinstance(mask, Tensor) else None
        causal = causal and seen is None and length > 1
        angles = given.get("position_embeddings")
        turned = isinstance(angles, tuple) and angles[0].shape[-2] == length
        raw = calls["raw"][0] if "raw" in calls else None
        h0 = x.detach().to(y.dtype)
        return cls(h0, seen, causal, _pairs(angles) if turned else None, cache, facts["number"], raw)

    def remember(self, k: Tensor, v: Tensor) -> Angles:
        """k and v `[rows, heads, length, size]` with those of earlier calls before them; called in a fixed order."""
        if self.cache is None:
            return k, v
        mine = [x for x in self.cache.layers if getattr(x, "side_owner", None) == self.owner]
        if self.taken == len(mine):
            if self.cache.get_seq_length() != k.shape[-2]:
                raise UserError(
                    "The cache was filled while the side network was off or training: begin with an empty one."
                )
            from transformers.cache_utils import DynamicLayer

            mine.append(DynamicLayer())
            mine[-1].side_owner = self.owner
            self.cache.layers.append(mine[-1])
        self.taken += 1
        k, v = mine[self.taken - 1].update(k, v)
        return k, v

    def keys(self, values: Tensor) -> Tensor:
        """`[rows, length, size]` with what earlier calls gave before it."""
        kept, _ = self.remember(values.unsqueeze(1), values[..., :1].unsqueeze(1))
        return kept.squeeze(1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(size)) v over what each position sees and over what is remembered."""
        k, v = self.remember(k, v)
        causal = self.causal and q.shape[-2] == k.shape[-2]
        seen = self._matrix(q.shape[-2], k) if self.causal and not causal else self.seen
        return F.scaled_dot_product_attention(
            q, k, v, seen, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
        )

    def _matrix(self, length: int, keys: Tensor) -> Tensor:
        if self.seen is not None:
            return self.seen
        whole = torch.ones(length, keys.shape[-2], dtype=torch.bool, device=keys.device)
        return whole.tril(keys.shape[-2] - length) if self.causal else whole

    def visible(self, length: int, keys: Tensor) -> Tensor:
        """Which `keys` each of the last `length` positions sees: ones and zeros `[1 or rows, length, keys]`."""
        whole = self._matrix(length, keys)
        whole = whole if whole.dim() == 2 else whole[:, 0]
        return (whole if whole.dim() == 3 else whole[None]).to(keys.dtype)

    def mean(self, visible: Tensor, values: Tensor) -> Tensor:
        """The mean of `[rows, keys, size]` over what each position sees; zero where it sees nothing."""
        return visible @ values / visible.sum(-1, keepdim=True).clamp(min=1)

    def rotate(self, x: Tensor) -> Tensor:
        """x `[rows, heads, length, size]` turned by evenly spaced angles of the backbone, as many as it has pairs."""
        if self.angles is None:
            return x
        half = x.shape[-1] // 2
        cos, sin = (
            a[..., spaced(a.shape[-1], half, a.device)].to(x.dtype).unsqueeze(-3) for a in self.angles
        )
        first, second = x[..., :half], x[..., half : 2 * half]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, x[..., 2 * half :]], -1)


def spaced(many: int, few: int, device: torch.device | None = None) -> Tensor:
    """`few` of `many` indices, evenly spaced from 0: with few = many / r every r-th, so that pair j of a head of size
    s / r turns as fast as its own rotary embedding would.
    """
    return torch.arange(few, device=device) * many // max(few, 1)


def _pairs(angles: Any) -> Angles:
    """One angle per pair: models repeat them for the second half of a head."""
    cos, sin = (a.detach()[..., : a.shape[-1] // 2] for a in angles)
    return cos, sin


def _seen(mask: Tensor, length: int, causal: bool) -> Tensor:
    """A block's mask in any of its forms as booleans."""
    seen = mask if mask.dtype == torch.bool else mask > -1 if mask.is_floating_point() else mask != 0
    if mask.dim() == 2:  # one flag per key
        seen = (seen if not mask.is_floating_point() else mask > 0)[:, None, None]
        if causal:
            square = torch.ones(length, seen.shape[-1], dtype=torch.bool, device=mask.device)
            seen = seen & square.tril(seen.shape[-1] - length)
    if mask.dim() not in (2, 4):
        raise UserError(f"A side network does not know a mask of {mask.dim()} dimensions.")
    return seen


def _cache(given: dict[str, Any], length: int, training: bool, name: str) -> Any:
    """The backbone's cache if states are kept in it, None if not. Raises `UserError` for one that takes no layers."""
    cache = given.get("past_key_values", given.get("past_key_value"))
    if cache is None:
        return None
    if training:
        if cache.get_seq_length() != length:
            raise UserError(
                f"{name} keeps nothing in a cache while it is trained: call the model with all tokens."
            )
        return None
    plain = type(cache).__name__ == "DynamicCache"
    if not plain or any(getattr(layer, "is_sliding", False) for layer in cache.layers):
        raise UserError(
            f"{name} keeps its own states in transformers' DynamicCache without sliding windows, not in "
            f"{type(cache).__name__}: generate with the default cache, or with use_cache=False."
        )
    return cache
