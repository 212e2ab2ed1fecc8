"""softmax(q [P_K; K]^T) [P_V; V]: learnt keys and values in every attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from tunewise.core.delta import Delta, P, SiteDelta
from tunewise.core.errors import UserError
from tunewise.sites import Site

from .attention import attending_module, key_value_shape, set_prefixes

__all__ = ["Prefix"]


class Prefix(Delta):
    """K' = [P_K; K], V' = [P_V; V], each `[key/value heads, tokens, head size]`, at every attention in
    `sites`.

    Through a registered attention function: no cache, no shifted positions, encoders and decoders alike. P_V
    starts at 0 and P_K at small noise (std 0.02), so step 0 differs from the base only by attention lost to
    the prefix. Trainable scalars: 2 tokens heads head_size per attention. Source: Prefix-Tuning, arXiv
    2101.00190, without the re-parameterising MLP (`P-Tuning v2`, arXiv 2110.07602, drops it too).
    """

    kinds: ClassVar[tuple[str, ...]] = ("attention",)
    identity: ClassVar[bool] = False
    unit: ClassVar[str] = "token"
    tokens: PositiveInt = 16
    sites: str | list[str] = "attention"

    def tensors(self, site: Site) -> dict[str, P]:
        owner = attending_module(site.module, site.name)
        if hasattr(owner, "has_relative_attention_bias"):
            raise UserError(
                f"Prefix does not work at {site.name}: its relative position bias has no room for a prefix."
            )
        heads, size = key_value_shape(site.module, site.name)
        k = torch.randn(heads, self.tokens, size) * 0.02
        return {"K": P(k, "prompt", 1), "V": P(torch.zeros(heads, self.tokens, size), "prompt", 1)}

    @staticmethod
    def switch(model: nn.Module, ts: list[SiteDelta]) -> None:
        set_prefixes(model, ts)

    def keys(self, t: Any) -> tuple[Tensor, Tensor]:
        """(K, V) before the attention's own, each `[kv heads, tokens, head size]`."""
        return t.K, t.V

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        heads, size = key_value_shape(site.module, site.name)
        return 2 * self.tokens * heads * size
