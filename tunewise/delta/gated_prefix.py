"""o = sum_i g_i Attn(q, K_i, V_i), g_i = sum exp(q K_i) / sum_j sum exp(q K_j): attention in parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["gated_attention"]


def gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefixes: Sequence[tuple[Tensor, Tensor]],
    mask: Tensor | None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention over [prefixes; k] as a gated sum over each alone: `[rows, heads, length, size]`, and the gates
    `[parts, rows, heads, length, 1]`, own part first; they sum to 1.

    q `[rows, heads, length, size]`, k, v and prefixes with key/value heads; the mask (True or 0 where it looks) is
    that of k alone. Source: the unified view, arXiv 2110.04366, its equation 7.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outs, sums = [], []
    for i, (key, value) in enumerate([(k, v), *prefixes]):
        groups = q.shape[1] // key.shape[1]
        scores = (q @ key.repeat_interleave(groups, 1).mT) * scale
        if i == 0 and mask is not None:
            lowest = torch.finfo(scores.dtype).min
            scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
        sums.append(scores.logsumexp(-1, keepdim=True))
        weights = F.dropout(scores.softmax(-1), dropout)
        outs.append(weights @ value.repeat_interleave(groups, 1))
    gates = torch.stack(sums).softmax(0)
    return (gates * torch.stack(outs)).sum(0), gates
