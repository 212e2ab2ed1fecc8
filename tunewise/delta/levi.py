"""y' = Up sum_l w_l z_l: all layers of the frozen model, each seen together with a small model of the task's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from tunewise.core.delta import P
from tunewise.core.errors import UserError
from tunewise.sites import Site

from .side import Side, default_linear
from .side_context import Context

__all__ = ["Views"]


class Views(Side):
    """y' = Up sum_l w_l z_l, z_l = gelu(mean A_l h_l) * sigmoid(G_l u) + W_l u, w = softmax(v), u = tanh(mean E[ids]).

    h_l are the taps and h_0, A_l `[size, width]`, E `[words, size]` with G_l, W_l `[size, size]` the task's own small
    model, trained from nothing on the token ids; v starts at 0, so that all layers count alike. `mean` is over what a
    position sees: all tokens in encoders, the earlier ones in decoders, never padding. What reads y' (a classifier)
    is one for all layers, so its logits are the mean of the layers' logits with weights w. small=False leaves the
    small model out: z_l = gelu(mean A_l h_l). Step 0 is not the base.
    Trainable scalars: with n = taps + 1, n size (width + 1) + n + (size + 1) width, and words size + 2 n size^2.
    Our reading: the paper gives no code; a bag of embeddings as the small model, the gate, one classifier for all
    layers, and no losses of single members are ours. Raises `UserError` for models that read no token ids (images,
    `inputs_embeds`, soft prompts). Source: LEVI, arXiv 2402.04644.
    """

    identity: ClassVar[bool] = False
    size: PositiveInt = 64
    small: bool = True

    @property
    def in_place(self) -> bool:
        return True

    def listens(self, everything: Sequence[Site], taps: Sequence[Site]) -> dict[str, nn.Module]:
        found = super().listens(everything, taps)
        return found | ({"raw": self._words(everything)} if self.small else {})

    def _words(self, everything: Sequence[Site]) -> nn.Module:
        found = next((s for s in everything if s.kind == "embedding" and s.role == "token"), None)
        if found is None:
            raise UserError(
                "LEVI's small model reads token ids, and this model has no token embedding: small=False."
            )
        self.__dict__["words"] = int(found.module.get_parameter("weight").shape[0])
        return found.module

    def chosen(self, everything: Sequence[Site]) -> list[Site]:
        if self.small:
            self._words(everything)
        return super().chosen(everything)

    def start(self, site: Site, taps: Sequence[Site]) -> dict[str, P]:
        k = self.size
        found: dict[str, P] = {}
        for i, tap in enumerate([taps[0], *taps]):
            weight, bias = default_linear(k, tap.out_features or 1)
            found |= {f"A{i}": P(weight, "direction"), f"A{i}_bias": P(bias, "bias")}
            if self.small:
                found[f"G{i}"] = P(default_linear(k, k, bias=False)[0], "gate")
                found[f"W{i}"] = P(default_linear(k, k, bias=False)[0], "weight")
        if self.small:
            found["E"] = P(torch.empty(self.__dict__["words"], k).normal_(), "weight")
        weight, bias = default_linear(site.out_features or 1, k)
        found["v"] = P(torch.zeros(len(taps) + 1), "mix")
        return found | {"up": P(weight, "direction"), "up_bias": P(bias, "bias")}

    def network(self, t: Any, h: list[Tensor], y: Tensor, context: Context) -> Tensor:
        u = self._view(t, context, y) if self.small else None
        w = torch.softmax(t.v, 0)
        total = torch.zeros_like(y[..., :1])
        for i, tap in enumerate([context.h0, *h]):
            z = F.gelu(self._mean(context, F.linear(tap, getattr(t, f"A{i}"), getattr(t, f"A{i}_bias"))))
            if u is not None:
                z = z * torch.sigmoid(F.linear(u, getattr(t, f"G{i}"))) + F.linear(u, getattr(t, f"W{i}"))
            total = total + w[i] * z
        return F.linear(total, t.up, t.up_bias)

    def _view(self, t: Any, context: Context, y: Tensor) -> Tensor:
        ids = context.raw
        if ids is None or ids.shape != y.shape[:2]:
            raise UserError(
                "LEVI's small model reads token ids, one for each position: no embeddings, no soft prompt."
            )
        return torch.tanh(self._mean(context, F.embedding(ids, t.E)))

    def _mean(self, context: Context, values: Tensor) -> Tensor:
        keys = context.keys(values)
        return context.mean(context.visible(values.shape[1], keys), keys)

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        k, n = self.size, len(taps) + 1
        maps = k * (n + sum(tap.out_features or 0 for tap in (taps[0], *taps)))
        view = self.__dict__["words"] * k + 2 * n * k * k if self.small else 0
        return maps + n + (site.out_features or 0) * (k + 1) + view
