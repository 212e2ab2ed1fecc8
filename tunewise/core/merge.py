"""W' - W of every site: merging, undoing, and weight-wise algebra are derived from the deltas' equations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunewise.sites import Site, is_quantized, read_weight, rounded, rounding_errors

from .delta import SiteDelta, forms, keeps_in_out
from .errors import UserError
from .forward import changed_weight
from .part import Part

if TYPE_CHECKING:
    from .adaptation import Adaptation

__all__ = ["effective", "materialize", "mergeable", "merged_tensors", "not_mergeable"]


def mergeable(part: Part) -> bool:
    """Whether the delta's equations can be written into the base weights."""
    given = set(forms(part))
    if given & {"around", "read", "switch"}:
        return False
    still = not given & {"input", "output"} or getattr(part, "training_only", False)
    return "weight" in given or bool(still or getattr(part, "linear", False))


def not_mergeable(adaptation: Adaptation) -> str | None:
    """The first delta that cannot be merged, as a sentence, or None."""
    for _, part in adaptation.deltas:
        if part.slot == "delta" and not mergeable(part):
            return (
                f"{type(part).__name__} cannot be merged: it is no linear change of a weight; "
                "keep the adaptation and load it with tw.restore."
            )
    return None


def effective(ts: list[SiteDelta], site: Site) -> tuple[Tensor, Tensor | None]:
    """(W', b') of a site under these deltas in evaluation, `[out, in]` of the whole module; float32 or wider."""
    modes = [t.training for t in ts]
    try:
        return _effective([t.eval() for t in ts], site)
    finally:
        for t, mode in zip(ts, modes, strict=True):
            t.train(mode)


def _effective(ts: list[SiteDelta], site: Site) -> tuple[Tensor, Tensor | None]:
    module = site.module
    before = read_weight(module, site.parameter or "weight").detach()
    weight = before.to(torch.promote_types(before.dtype, torch.float32))
    bias = getattr(module, "bias", None)
    bias = bias.detach().to(weight.dtype) if isinstance(bias, Tensor) else None
    for t in [t for t in ts if "weight" in forms(t.part)]:
        weight = changed_weight(t, weight)
    rest = [t for t in ts if "weight" not in forms(t.part)]
    if not rest:
        return (weight.transpose(-1, -2) if keeps_in_out(site) else weight), bias
    if site.kind != "linear":
        raise UserError(
            f"{type(rest[0].part).__name__} at {site.name} ({site.kind}) cannot be merged; only linear sites can."
        )
    return _probe(rest, weight.transpose(-1, -2) if keeps_in_out(site) else weight, bias, site)


def _probe(
    ts: list[SiteDelta], weight: Tensor, bias: Tensor | None, site: Site
) -> tuple[Tensor, Tensor | None]:
    """An affine map is known from its answers to 0 and to the identity."""

    def respond(x: Tensor) -> Tensor:
        for t in ts:
            x = t.part.input(t.cast(x.dtype), x) if "input" in forms(t.part) else x
        y = F.linear(x, weight, bias)
        for t in ts:
            if "output" in forms(t.part):
                mine = y if t.rows is None else y.index_select(-1, t.rows)
                mine = t.part.output(t.cast(y.dtype), x, mine)
                y = mine if t.rows is None else y.index_copy(-1, t.rows, mine)
        return y

    zero = respond(weight.new_zeros(1, weight.shape[1]))[0]
    new = (
        respond(torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)) - zero
    ).T.contiguous()
    if bias is None and zero.abs().max() > 0:
        raise UserError(
            f"{site.name} has no bias, and {type(ts[0].part).__name__} adds one: it cannot be merged there."
        )
    return new, None if bias is None else zero


def _by_module(adaptation: Adaptation) -> dict[tuple[nn.Module, str], tuple[Site, list[SiteDelta]]]:
    found: dict[tuple[nn.Module, str], tuple[Site, list[SiteDelta]]] = {}
    for _, site, t in adaptation.sites:
        if set(forms(t.part)) & {"weight", "input", "output"} and not t.part.training_only:
            found.setdefault((site.module, site.parameter or "weight"), (site, []))[1].append(t)
    return found


@torch.no_grad()
def materialize(adaptation: Adaptation, name: str | None = None) -> dict[str, Tensor]:
    """{site: W' - W}, each `[out, in]` of the whole module, in float32; existing parameters under their own
    name.
    """
    reason = not_mergeable(adaptation)
    if reason:
        raise UserError(reason)
    if adaptation.existing and not adaptation.undo:
        raise UserError(
            "The base weights were trained in place without a copy (undo=False): W' - W is not known."
        )
    result = {}
    for site, ts in _by_module(adaptation).values():
        if name is None or site.name == name:
            weight, bias = effective(ts, site)
            before = read_weight(site.module, site.parameter or "weight").detach()
            result[site.name] = weight - (before.transpose(-1, -2) if keeps_in_out(site) else before).to(
                weight.dtype
            )
            own = getattr(site.module, "bias", None)
            if bias is not None and isinstance(own, Tensor) and not torch.equal(bias, own.to(bias.dtype)):
                result[f"{site.name}.bias"] = bias - own.to(bias.dtype)
    for key, e in adaptation.existing.items():
        if name is None or key == name:
            moved = (e.ours - e.original).detach().float()
            result[key] = result[key] + moved if key in result else moved
    return result


@torch.no_grad()
def merged_tensors(
    adaptation: Adaptation, quantized: bool = False
) -> tuple[list[tuple[nn.Module, str, Tensor]], dict[str, float]]:
    """What merging writes, as (module, parameter, new value in the module's own layout and dtype), and what
    rounding it to codes costs, as `rounding_errors` has it.
    """
    found: list[tuple[nn.Module, str, Tensor]] = []
    lost: dict[str, tuple[float, float]] = {}
    for (module, parameter), (site, ts) in _by_module(adaptation).items():
        weight, bias = effective(ts, site)
        new = weight.transpose(-1, -2) if keeps_in_out(site) else weight
        if is_quantized(module):
            new, lost[site.name] = rounded(module, site.name, new, quantized)
        else:
            new = new.to(getattr(module, parameter).dtype).contiguous()
        found.append((module, parameter, new))
        if bias is not None:
            found.append((module, "bias", bias.to(module.bias.dtype)))  # type: ignore[arg-type]
    return found, rounding_errors(lost)
