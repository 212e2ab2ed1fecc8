"""A new linear layer on pooled hidden states, for backbones without a head of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tunewise.core.delta import P
from tunewise.core.errors import UserError
from tunewise.sites import Site

from .base import Head, hidden_size, label_names, sequence_mask

__all__ = ["PooledHead", "pool"]


class PooledHead(Head):
    """logits = W pool(h) + b in float32, with W `[classes, hidden]` and b `[classes]` zero at the start.

    pooling  "mean" of the real tokens, the "first" of them (BERT's [CLS]) or the "last" one (decoders)
    outputs  number of classes; learnt from the task
    Padding may be on either side. With W = 0 the backbone gets no gradient in the first step (`ProbedHead` starts
    elsewhere). Raises `UserError` for encoder-decoder models.
    """

    auto: ClassVar[str] = "base"
    pooling: Literal["mean", "first", "last"] = "mean"
    outputs: int | None = None

    def setup(self, task: Any, tokenizer: Any, model: nn.Module) -> None:
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise UserError(
                f"PooledHead cannot read {type(model).__name__}, an encoder-decoder: use ClassHead()."
            )
        hidden_size(model, "PooledHead")
        self.outputs = len(label_names(task)) or 1

    def tensors(self, site: Site) -> dict[str, P]:
        if self.outputs is None:
            raise UserError("PooledHead does not know its number of classes: give outputs=N.")
        width = hidden_size(site.module, "PooledHead")
        weight, bias = torch.zeros(self.outputs, width), torch.zeros(self.outputs)
        return {"weight": P(weight, tag="head"), "bias": P(bias, tag="head")}

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        return (self.outputs or 0) * (hidden_size(site.module, "PooledHead") + 1)

    def logits(self, t: Any, outputs: Any, batch: Any) -> Tensor:
        return self.read_out(t, self.latent(outputs, batch))

    def read_out(self, t: Any, z: Tensor) -> Tensor:
        """The answer to what `latent` gives."""
        return z @ t.weight.T + t.bias

    def latent(self, outputs: Any, batch: Any) -> Tensor:
        """The hidden states in float32, pooled to `[rows, hidden]`."""
        hidden = outputs if isinstance(outputs, Tensor) else getattr(outputs, "last_hidden_state", None)
        if hidden is None:
            raise UserError(
                f"{type(self).__name__}: {type(outputs).__name__} has no hidden states; load a base model."
            )
        if hidden.dim() == 4:  # convolutional maps [rows, channels, height, width]
            hidden = hidden.flatten(2).transpose(1, 2)
        mask = sequence_mask(batch.inputs, hidden.shape[:2], hidden.device)
        hidden = hidden[:, -mask.shape[1] :]  # soft prompts stand in front and are no part of the text
        return pool(hidden.float(), mask, self.pooling)


def pool(hidden: Tensor, mask: Tensor, how: str) -> Tensor:
    """`[rows, tokens, hidden]`, bool mask `[rows, tokens]` -> `[rows, hidden]`, 0 for an empty row; "none": as is."""
    if how == "none":
        return hidden
    if how == "mean":
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
    positions = torch.arange(mask.shape[1], device=mask.device)
    if how == "first":
        at = torch.where(mask, positions, mask.shape[1]).amin(1).clamp(max=mask.shape[1] - 1)
    else:
        at = torch.where(mask, positions, 0).amax(1)
    chosen = hidden[torch.arange(len(hidden), device=hidden.device), at]
    return chosen * mask.any(1, keepdim=True)
