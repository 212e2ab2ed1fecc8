"""softmax(q [P_K; K]^T) [P_V; V]: learnt keys and values in every attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from tunewise.core.delta import Delta, P, SiteDelta
from tunewise.core.errors import UserError
from tunewise.sites import Site

from .attention import attending_module, key_value_shape, set_prefixes
from .prompt import Folded

__all__ = ["Prefix"]


class Prefix(Delta):
    """K' = [P_K; K], V' = [P_V; V], each `[key/value heads, tokens, head size]`, at every attention in `sites`.

    hidden  None: P_K and P_V are trained themselves. A number: [P_K; P_V] = W_2 tanh(W_1 E + b_1) + b_2 with one
            E `[tokens, width]` and W_1 `[hidden, width]` for all attentions and a W_2 for each; `fold` leaves P_K, P_V
    gated   the same answer as a gated sum, (1 - g) Attn(q, K, V) + g Attn(q, P_K, P_V), g the prefix's part of the
            softmax's sum: the attention of the base stands beside it, every score of both is kept
    Through a registered attention function: no cache, no shifted positions, encoders and decoders alike. P_V starts
    at 0 and P_K at noise (std 0.02, or what the network makes of noise), so step 0 differs from the base only by
    attention lost to the prefix. Trainable scalars: 2 tokens heads head_size per attention; with a network tokens
    width + (width + 1) hidden, and 2 heads head_size (hidden + 1) per attention. Source: Prefix-Tuning, arXiv
    2101.00190; without the network P-Tuning v2, arXiv 2110.07602; the gated view: arXiv 2110.04366.
    """

    kinds: ClassVar[tuple[str, ...]] = ("attention",)
    identity: ClassVar[bool] = False
    unit: ClassVar[str] = "token"
    tokens: PositiveInt = 16
    sites: str | list[str] = "attention"
    hidden: PositiveInt | None = None
    gated: bool = False

    def shared(self, sites: Sequence[Site]) -> dict[str, P]:
        if not self.hidden:
            return {}
        heads, size = key_value_shape(sites[0].module, sites[0].name)
        width = sites[0].in_features or heads * size
        bound = width**-0.5
        return {
            "E": P(torch.randn(self.tokens, width), "prompt", 0),
            "W1": P(torch.empty(self.hidden, width).uniform_(-bound, bound), "weight"),
            "b1": P(torch.zeros(self.hidden), "bias"),
        }

    def tensors(self, site: Site) -> dict[str, P]:
        owner = attending_module(site.module, site.name)
        if hasattr(owner, "has_relative_attention_bias"):
            raise UserError(
                f"{type(self).__name__} does not work at {site.name}: its relative position bias has no room for "
                "a prefix."
            )
        heads, size = key_value_shape(site.module, site.name)
        if not self.hidden:
            k = torch.randn(heads, self.tokens, size) * 0.02
            return {"K": P(k, "prompt", 1), "V": P(torch.zeros(heads, self.tokens, size), "prompt", 1)}
        bound = self.hidden**-0.5
        w = torch.empty(2, heads, size, self.hidden).uniform_(-bound, bound)
        w[1] = 0
        return {"W2": P(w, "weight"), "b2": P(torch.zeros(2, heads, size), "bias")}

    @staticmethod
    def switch(model: nn.Module, ts: list[SiteDelta]) -> None:
        set_prefixes(model, ts)

    def settle(self, model: nn.Module, t: SiteDelta) -> None:
        """Whenever what is active has changed: prepares t for `keys`."""

    def keys(self, t: Any) -> tuple[Tensor, Tensor]:
        """(K, V) before the attention's own, each `[kv heads, tokens, head size]`, or with rows in front."""
        if not self.hidden:
            return t.K, t.V
        z = torch.tanh(F.linear(t.shared.E, t.shared.W1, t.shared.b1))
        k, v = torch.einsum("th,cnsh->cnts", z, t.W2) + t.b2[:, :, None]
        return k, v

    def folded(self, entries: Sequence[tuple[Site, Any]], model: nn.Module) -> Folded:
        """The same prefix as constants: its P_K and P_V at every attention."""
        found = {site.name: dict(zip("KV", self.keys(t), strict=True)) for site, t in entries}
        return Prefix(self.tokens, self.sites, None, self.gated), found

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        heads, size = key_value_shape(site.module, site.name)
        return 2 * heads * size * (self.hidden + 1 if self.hidden else self.tokens)
