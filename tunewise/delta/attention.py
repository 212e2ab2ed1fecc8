"""softmax(q [P_K; K]^T) [P_V; V]: learnt keys and values before an attention's own, for encoders and
decoders.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunewise.core.delta import SiteDelta
from tunewise.core.errors import UserError
from tunewise.sites import Site, find_sites

from .gated_prefix import gated_attention

__all__ = ["attending_module", "key_value_shape", "prefix_attention", "set_prefixes"]

NAME = "tw_sdpa"


def prefix_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention over the active prefixes of `module` and its own keys; needs no cache and shifts no position."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    prefixes: tuple[SiteDelta, ...] = module.__dict__.get("tw_prefixes", ())
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", False) if causal is None else causal
    if prefixes and mask is None and query.shape[2] > 1 and causal:
        # the implied causal mask would count the prefix as positions: write it out
        square = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        mask = square.tril(key.shape[2] - query.shape[2])[None, None]
    for t in prefixes:
        ear = t.__dict__.get("ear")
        if ear is not None and ear.open:  # a pass of the prompt alone, for the sake of its keys and values
            ear.heard = key, value
            return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None
    gated = []
    told = options.pop(
        "tw_told", {}
    )  # by the block's call, so that it holds when a checkpointed block runs again
    for t in prefixes:
        if not torch.compiler.is_compiling():
            t.calls += 1
        prefix: Any = t.part
        t.__dict__["told"] = told.get(id(t))
        extra = [e.to(key.dtype).expand(key.shape[0], -1, -1, -1) for e in prefix.keys(t.cast(key.dtype))]
        t.__dict__["told"] = None
        if prefix.gated:
            gated.append((extra[0], extra[1]))
            continue
        if mask is not None:
            mask = F.pad(mask, (extra[0].shape[2], 0), value=True if mask.dtype == torch.bool else 0.0)
        key, value = torch.cat([extra[0], key], 2), torch.cat([extra[1], value], 2)
    if gated:
        drop = options.get("dropout") or 0.0
        found, _ = gated_attention(query, key, value, gated, mask, options.get("scaling"), drop)
        return found.transpose(1, 2).contiguous(), None
    if prefixes:
        options["is_causal"] = False
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **options)  # type: ignore[no-any-return]


def _key_site(module: nn.Module, name: str) -> Site:
    found = next(
        (s for s in find_sites(module) if s.kind == "linear" and (s.role == "key" or "key" in s.roles)), None
    )
    if found is None:
        raise UserError(f"{name} has no key projection that is known, so it takes no prefix.")
    return found


def attending_module(module: nn.Module, name: str) -> nn.Module:
    """The module below an attention site that calls the attention function: the one that owns the projections."""
    return module.get_submodule(_key_site(module, name).name.rpartition(".")[0])


def key_value_shape(module: nn.Module, name: str) -> tuple[int, int]:
    """(key/value heads, head size) of an attention."""
    owner: Any = attending_module(module, name)
    size = getattr(owner, "head_dim", None) or getattr(owner, "attention_head_size", None)
    config = getattr(owner, "config", None)
    if size is None and config is not None and hasattr(config, "num_attention_heads"):
        size = config.hidden_size // config.num_attention_heads
    if size is None:
        raise UserError(f"The head size of {name} is not known, so it takes no prefix.")
    site = _key_site(module, name)
    width = len(site.roles["key"]) if site.roles else site.out_features
    assert width is not None
    return width // int(size), int(size)


def set_prefixes(model: nn.Module, ts: list[SiteDelta]) -> None:
    """Registers our attention while prefixes are active and puts the model's own name back afterwards."""
    prefixes: dict[nn.Module, list[SiteDelta]] = {}
    for t in ts:
        prefixes.setdefault(attending_module(t.root, t.site_name), []).append(t)
    for module in model.modules():
        module.__dict__.pop("tw_prefixes", None)
    for module, mine in prefixes.items():
        module.__dict__["tw_prefixes"] = tuple(mine)
    for t in ts:
        part: Any = t.part
        part.settle(model, t)
    configs: dict[int, Any] = {
        id(m.config): m.config
        for m in model.modules()
        if hasattr(getattr(m, "config", None), "_attn_implementation")
    }
    own: list[str | None] | None = model.__dict__.get("tw_attention")  # not in the config: that one is saved
    if prefixes and own is None:
        own = [c._attn_implementation for c in configs.values()]
        for current in own:
            if current not in ("sdpa", "eager", None):
                raise UserError(f'Prefixes need sdpa attention, not "{current}"; load the model with it.')
        _register()
        model.__dict__["tw_attention"] = own
        for config in configs.values():
            config._attn_implementation = NAME
    elif not prefixes and own is not None:
        for config, current in zip(configs.values(), own, strict=True):
            config._attn_implementation = current
        del model.__dict__["tw_attention"]


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    AttentionInterface.register(NAME, prefix_attention)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
