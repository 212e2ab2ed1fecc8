"""Prefixes as PEFT keeps them: keys and values of all layers in one matrix, before a text that begins behind them."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from tunewise.core.delta import Delta
from tunewise.core.errors import UserError
from tunewise.core.handle import Handle
from tunewise.delta.attention import attending_module, key_value_shape
from tunewise.delta.positions import ShiftedPositions
from tunewise.delta.prefix import Prefix
from tunewise.sites import Site, find_sites

__all__ = ["prefix_matrix", "prefix_parts"]


def _attentions(model: Any) -> tuple[list[Site], int, int]:
    """Every attention in order, and the (heads, head size) of all. Raises `UserError` where PEFT has no place."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UserError("PEFT's prefixes of encoder-decoders are neither read nor written here.")
    kinds = getattr(getattr(model, "config", None), "layer_types", None) or ()
    if "sliding_attention" in kinds:
        raise UserError(
            "PEFT's prefixes lie in the cache, from which sliding attention drops them; such models are neither "
            "read nor written here."
        )
    sites = [s for s in find_sites(model) if s.kind == "attention"]
    shapes = {key_value_shape(s.module, s.name) for s in sites}
    if len(shapes) != 1:
        raise UserError(
            "PEFT keeps prefixes of one shape for all layers, and this model's attentions differ."
        )
    return sites, *shapes.pop()


def prefix_parts(
    model: nn.Module, config: dict[str, Any], value: Tensor, where: str
) -> tuple[list[Delta], dict[str, dict[str, Tensor]]]:
    """(a Prefix and what moves the text behind it, {attention: {"K", "V"}}) of PEFT's matrix.

    value `[tokens, layers x 2 x heads x size]`. Raises `UserError` for another shape.
    """
    sites, heads, size = _attentions(model)
    tokens = config.get("num_virtual_tokens")
    wanted = (tokens, len(sites) * 2 * heads * size)
    if tuple(value.shape) != wanted:
        raise UserError(
            f"{where}: prompt_embeddings has the shape {tuple(value.shape)}; its options and this model need {wanted}."
        )
    each = value.view(len(value), len(sites), 2, heads, size).permute(1, 2, 3, 0, 4)
    found = {site.name: {"K": k, "V": v} for site, (k, v) in zip(sites, each, strict=True)}
    return [Prefix(tokens=len(value)), ShiftedPositions(len(value))], found


@torch.no_grad()
def prefix_matrix(handle: Handle) -> tuple[Tensor, dict[str, Any]]:
    """(PEFT's matrix, its options) of a prefix: a network's or deep prompts' as constants.

    Where the text is not moved behind the prefix, its keys are turned as far as PEFT moves the text. Raises
    `UserError` where that cannot be done, and for a prefix at some attentions alone.
    """
    model: Any = handle.model
    part: Any = next(p for _, p in handle.deltas if isinstance(p, Prefix))
    _, values = part.folded([(site, t) for _, site, t in handle.sites if t.part is part], model)
    sites, heads, size = _attentions(model)
    if list(values) != [s.name for s in sites]:
        raise UserError(
            "PEFT keeps prefixes of all attentions, and this one has them at some; keep the adaptation."
        )
    moved = [p.count for _, p in handle.deltas if isinstance(p, ShiftedPositions)]
    if moved and sum(moved) != part.tokens:
        raise UserError(
            f"PEFT moves the text behind {part.tokens} tokens of prefix, and it is moved by {sum(moved)}."
        )
    rows = []
    for site in sites:
        k, v = values[site.name]["K"], values[site.name]["V"]
        rows.append(torch.stack([k if moved else _turned(model, site, k), v]))
    matrix = torch.stack(rows).permute(3, 0, 1, 2, 4).reshape(part.tokens, -1)
    options = {
        "num_virtual_tokens": part.tokens,
        "token_dim": heads * size,
        "num_attention_heads": heads,
        "num_layers": len(sites),
        "num_transformer_submodules": 1,
        "encoder_hidden_size": heads * size,
        "prefix_projection": False,
    }
    return matrix, options


def _turned(model: nn.Module, site: Site, k: Tensor) -> Tensor:
    """Keys `[heads, tokens, size]` that a text at positions tokens + i sees as this one does at i."""
    owner = attending_module(site.module, site.name)
    rotate = getattr(sys.modules[type(owner).__module__], "apply_rotary_pos_emb", None)
    turns: Any = [m for m in model.modules() if "inv_freq" in m._buffers]
    if (
        rotate is None
        or len(turns) != 1
        or getattr(turns[0], "rope_type", "default") in ("dynamic", "longrope")
    ):
        raise UserError(
            f"PEFT begins the text behind the prefix, at position {k.shape[1]}, and {type(model).__name__} has no "
            "rotation that could be undone: add ShiftedPositions to the recipe and tune again, or keep the adaptation."
        )
    at = torch.full((1, 1), k.shape[1], device=k.device)
    cos, sin = (
        v / getattr(turns[0], "attention_scaling", 1.0) for v in turns[0](k.float()[None], position_ids=at)
    )
    turned, rest = k[..., : cos.shape[-1]].float(), k[..., cos.shape[-1] :]
    return torch.cat([rotate(turned[None], turned[None], cos, sin)[1][0].to(k.dtype), rest], -1)
