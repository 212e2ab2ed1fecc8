"""f([P*; E + (A B)]): a short prompt, enriched from a low-rank change of the input's embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from tunewise.core.delta import P
from tunewise.core.errors import UserError
from tunewise.sites import Site

from .prompt import SoftPrompt

__all__ = ["FusedPrompt"]


class FusedPrompt(SoftPrompt):
    """f([P*; E']), E'_i = E_i + (A B)_i, P* = P_f + sum_k g_k U_k relu(D_k P_f), P_f = P + S (A B) V_1 V_2.

    S = softmax(P W_q ((A B) W_k)' / sqrt(size)) fuses the short prompt P `[tokens, width]` with the change A B of the
    first `reach` input embeddings, A `[reach, rank]`, B `[rank, width]`; g = softmax(W_g mean(P_f)) weighs `spaces`
    projections. i counts the row's own tokens, so padding moves nothing, also while generating. The rank is what
    the budget of a plain prompt of `length` tokens leaves: tokens width + rank (reach + width) <= length width. B,
    V_2 and U_k start at 0: step 0 is prompt tuning with P. P* and A B do not depend on the input.
    Source: EPT, arXiv 2405.11464; the sizes of fusion and projections are ours. Raises `UserError` for a budget
    that leaves no rank.
    """

    unit: ClassVar[str] = "token"
    tokens: PositiveInt = 40
    length: PositiveInt = 100
    reach: PositiveInt = 256
    size: PositiveInt = 16
    spaces: PositiveInt = 4

    def rank(self, width: int) -> int:
        """The rank of A B."""
        found = (self.length - self.tokens) * width // (self.reach + width)
        if found < 1:
            raise UserError(
                f"FusedPrompt: a budget of length={self.length} tokens leaves no rank beside tokens={self.tokens} "
                f"and reach={self.reach} at width {width}; raise length."
            )
        return found

    def tensors(self, site: Site) -> dict[str, P]:
        found = super().tensors(site)
        width = found["P"].value.shape[1]
        rank, h, k = self.rank(width), self.size, self.spaces

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape) * shape[-2] ** -0.5

        return found | {
            "A": P(torch.randn(self.reach, rank) * 0.02, "direction"),
            "B": P(torch.zeros(rank, width), "direction"),
            "Wq": P(noise(width, h), "direction"),
            "Wk": P(noise(width, h), "direction"),
            "V1": P(noise(width, h), "direction"),
            "V2": P(torch.zeros(h, width), "direction"),
            "D": P(noise(k, width, h), "direction"),
            "U": P(torch.zeros(k, h, width), "direction"),
            "Wg": P(noise(width, k), "router"),
        }

    def gates(self, t: Any, fused: Tensor) -> Tensor:
        """g `[spaces]`, of sum 1."""
        return (fused.mean(0) @ t.Wg).softmax(-1)

    def prompt(self, t: Any, rows: int, kwargs: dict[str, Any]) -> Tensor:
        """P* `[tokens, width]`."""
        change = t.A @ t.B
        scores = (t.P @ t.Wq) @ (change @ t.Wk).mT * self.size**-0.5
        fused = t.P + scores.softmax(-1) @ change @ t.V1 @ t.V2
        spaces = F.relu(fused @ t.D) @ t.U
        return fused + (self.gates(t, fused)[:, None, None] * spaces).sum(0)

    def around(self, t: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            kwargs, args = {"input_ids": args[0], **kwargs}, args[1:]
        embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        if embeds is None:
            embeds = t.root.get_input_embeddings()(kwargs["input_ids"])
        at = self._places(embeds, mask, kwargs.get("past_key_values"))
        inside = (at >= 0) & (at < self.reach)
        change = (t.A @ t.B)[at.clamp(0, self.reach - 1)] * inside.unsqueeze(-1)
        kwargs |= {"input_ids": None, "inputs_embeds": embeds + change.to(embeds.dtype)}
        return super().around(t, call, args, kwargs)

    def _places(self, embeds: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        """Which of its row's tokens each one is, `[rows, length]`; padding on the left is below 0."""
        length = embeds.shape[1]
        if mask is not None:
            return (mask.long().cumsum(1) - 1)[:, -length:]
        before = 0 if cache is None else max(int(cache.get_seq_length()) - self.tokens, 0)
        return torch.arange(before, before + length, device=embeds.device).expand(len(embeds), -1)

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        width = int(site.module.get_input_embeddings().embedding_dim)  # type: ignore[operator,union-attr]
        small = 4 * width * self.size + self.spaces * (2 * width * self.size + width)
        return self.tokens * width + self.rank(width) * (self.reach + width) + small
