"""Where side blocks start: at pruned weights of the backbone's blocks, or at random in their shape."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tunewise.core.delta import P
from tunewise.core.errors import UserError
from tunewise.sites import Site, find_sites, read_weight

from .attention import key_value_shape
from .side_block import Shape
from .side_context import spaced

__all__ = ["Source", "channels", "pruned", "pruned_norm", "random_start", "shape_of", "source_of"]

ROLES = ("query", "key", "value", "output", "gate", "up", "down")
STD = 0.02
_BEHIND = re.compile(r"^(attention|output)\.|^sa_layer_norm$")


@dataclass
class Source:
    """A backbone's block taken apart: {role: (W `[out, in]`, b)}, its two norms, and what it is made of."""

    maps: dict[str, tuple[Tensor, Tensor | None]]
    norms: list[nn.Module]
    shape: Shape
    rotary: bool


def source_of(site: Site) -> Source:
    """The block at `site`. Raises `UserError` where its attention is not known."""
    block, width = site.module, site.out_features or 0
    maps: dict[str, tuple[Tensor, Tensor | None]] = {}
    norms: list[tuple[str, nn.Module]] = []
    for found in find_sites(block):
        if found.kind == "norm" and found.in_features == width:
            norms.append((found.name, found.module))
        for role in (found.roles or [found.role]) if found.kind == "linear" else ():
            if role in ROLES and role not in maps:
                rows = found.roles.get(role, slice(None))
                weight = read_weight(found.module).detach().float()
                bias = found.module._parameters.get("bias")
                weight = weight.T if found.transposed else weight
                maps[role] = weight[rows], None if bias is None else bias.detach().float()[rows]
    if not {"query", "key", "value", "output"} <= set(maps):
        raise UserError(
            f"{site.name} has no attention with projections that are known, so it gets no side block; use ladder."
        )
    return Source(maps, [m for _, m in norms[:2]], _shape(site, maps, norms), _rotary(block))


def _shape(site: Site, maps: dict[str, Any], norms: list[tuple[str, nn.Module]]) -> Shape:
    try:
        groups, size = key_value_shape(site.module, site.name)
    except UserError:
        raise UserError(
            f"The head size of {site.name} is not known, so it gets no side block; use ladder."
        ) from None
    first: Any = norms[0][1] if norms else None
    centred = isinstance(first, nn.LayerNorm) or getattr(first, "bias", None) is not None
    biased = tuple(role for role, (_, bias) in maps.items() if bias is not None)
    if getattr(first, "bias", None) is not None:
        biased += ("norm",)
    width = site.out_features or 0
    return Shape(
        width=width,
        heads=len(maps["query"][0]) // size,
        groups=groups,
        size=size,
        inner=len(maps["up"][0]) if "up" in maps else 4 * width,
        gated="gate" in maps,
        function=_function_name(site.module),
        post=bool(norms and _BEHIND.search(norms[0][0])),
        centred=centred,
        eps=_eps(first),
        biased=biased,
    )


def _eps(norm: Any) -> float:
    return float(getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", None) or 1e-6)


def _function_name(block: nn.Module) -> str:
    config: Any = next((m.config for m in block.modules() if hasattr(m, "config")), None)
    names = ("hidden_act", "hidden_activation", "activation_function", "activation")
    return next((str(getattr(config, n)) for n in names if isinstance(getattr(config, n, None), str)), "gelu")


def _rotary(block: nn.Module) -> bool:
    return "position_embeddings" in inspect.signature(block.forward).parameters


def shape_of(source: Source, reduction: int) -> Shape:
    """The block at 1/reduction of its width: width, width of a head and of the MLP shrink, the heads stay."""
    old = source.shape
    size = 2 * max(round(old.size / 2 / reduction), 1) if source.rotary else max(old.size // reduction, 1)
    return replace(
        old,
        width=max(old.width // reduction, 1),
        size=min(size, old.size),
        inner=max(old.inner // reduction, 1),
    )


def random_start(i: int, shape: Shape) -> dict[str, P]:
    """Maps from N(0, 0.02), biases 0, norms 1: how transformers starts a new model."""
    found = {}
    for role, (outs, ins) in shape.sizes.items():
        found[f"{role}{i}"] = P(torch.empty(outs, ins).normal_(std=STD), "weight")
        if role in shape.biased:
            found[f"{role}{i}_bias"] = P(torch.zeros(outs), "bias")
    for n in range(2):
        found[f"norm{i}_{n}"] = P(torch.ones(shape.width), "scale")
        if "norm" in shape.biased:
            found[f"norm{i}_{n}_bias"] = P(torch.zeros(shape.width), "bias")
    return found


def _most(importance: Tensor, count: int) -> Tensor:
    """Indices of the largest, in order."""
    return importance.topk(count).indices.sort().values


def channels(sources: Iterable[Source], width: int, count: int) -> Tensor:
    """The residual channels to keep, one choice for all blocks: sums of |w| over all that reads or writes them."""
    total = torch.zeros(width)
    for source in sources:
        for role, (weight, _) in source.maps.items():
            if weight.is_meta:  # only sizes are asked for
                return torch.arange(count)
            total += weight.abs().sum(1 if role in ("output", "down") else 0).cpu()
    return _most(total, count)


def _inner_rows(source: Source, shape: Shape) -> dict[str, Tensor]:
    """The kept rows of query, key and value, and hidden units of the MLP."""
    old, maps = source.shape, {role: weight.abs().cpu() for role, (weight, _) in source.maps.items()}
    grouped = old.groups, -1, old.size
    value = maps["value"].sum(1).view(old.groups, old.size)
    value = value + maps["output"].sum(0).view(grouped).sum(1)
    if source.rotary:
        pairs = spaced(old.size // 2, shape.size // 2)
        turned = torch.cat([pairs, pairs + old.size // 2]).expand(old.groups, -1)
    else:
        together = maps["key"].sum(1).view(old.groups, old.size) + maps["query"].sum(1).view(grouped).sum(1)
        turned = torch.stack([_most(group, shape.size) for group in together])
    kept = torch.stack([_most(group, shape.size) for group in value])
    each = old.heads // old.groups

    def rows(chosen: Tensor, per: int) -> Tensor:
        chosen = chosen.repeat_interleave(per, 0)
        return (chosen + old.size * torch.arange(len(chosen))[:, None]).flatten()

    found = {"query": rows(turned, each), "key": rows(turned, 1), "value": rows(kept, 1)}
    found["output"] = rows(kept, each)
    if "up" in maps and "down" in maps:
        units = maps["up"].sum(1) + maps["down"].sum(0) + (maps["gate"].sum(1) if "gate" in maps else 0)
        found |= dict.fromkeys(("up", "gate", "down"), _most(units, shape.inner))
    return found


def pruned(i: int, source: Source, shape: Shape, kept: Tensor) -> dict[str, P]:
    """The block's own weights at the kept channels, head dimensions and hidden units; what it lacks is random."""
    found = random_start(i, shape)
    if any(weight.is_meta for weight, _ in source.maps.values()):
        return {name: P(p.value.to("meta"), p.tag) for name, p in found.items()}
    rows = _inner_rows(source, shape)
    for role, (weight, bias) in source.maps.items():
        if role not in rows:
            continue
        reads = role not in ("output", "down")
        outs, ins = (rows[role], kept) if reads else (kept, rows[role])
        found[f"{role}{i}"] = P(weight.cpu()[outs][:, ins].contiguous(), "weight")
        if bias is not None:
            found[f"{role}{i}_bias"] = P(bias.cpu()[outs], "bias")
    for n, module in enumerate(source.norms):
        found |= pruned_norm(f"norm{i}_{n}", module, kept, "norm" in shape.biased)
    return found


def pruned_norm(name: str, module: nn.Module, kept: Tensor, biased: bool) -> dict[str, P]:
    """A norm of the backbone at the kept channels."""
    names = {"weight": name, "bias": f"{name}_bias"} if biased else {"weight": name}
    values = {new: module.get_parameter(old).detach().float() for old, new in names.items()}
    tags = {name: "scale", f"{name}_bias": "bias"}
    return {n: P(v[kept.to(v.device)], tags[n]) for n, v in values.items()}
