"""The side networks that tests go through, and models for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from tunewise.core.handle import Handle
from tunewise.delta.levi import Views
from tunewise.delta.side_chain import LadderSide, QuantizedSide
from tunewise.delta.unipt import Parallel

NETWORKS = (
    LadderSide(reduction=4),
    QuantizedSide(reduction=4),
    QuantizedSide(reduction=4, pooling="max"),
    Parallel(),
    Parallel(variant="projected"),
    Views(size=6),
)
IDS = ("lst", "qst", "qst-max", "unipt", "unipt-projected", "levi")


def llama(depth: int = 2, **options: Any) -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 64, "vocab_size": 99, "pad_token_id": 0, "num_hidden_layers": depth}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | options)).eval()


@torch.no_grad()
def moved(handle: Handle, size: float = 0.05) -> Handle:
    """Every tensor leaves its start."""
    make = torch.Generator().manual_seed(3)
    for p in handle.parameters():
        p.add_(torch.randn(p.shape, generator=make) * size)
    return handle
