"""Building an adaptation: tensors at sites, claimed base parameters, and what is refused before that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from tunewise.sites import Site, dequantized, device_of, is_quantized, select, with_widths

from .delta import Delta, SiteDelta, TapBuffer, forms
from .errors import UserError

if TYPE_CHECKING:
    from .adaptation import Adaptation

__all__ = ["PREFIX", "Existing", "Info", "build_part", "root_site"]

PREFIX = "tw_"


@dataclass(frozen=True)
class Info:
    """One trainable tensor of an adaptation and what it is."""

    tensor: nn.Parameter
    tag: str
    axis: int | None
    owner: str
    site: str
    part: Delta


@dataclass
class Existing:
    """A parameter of the backbone that this adaptation trains: the places that hold it, the original, ours."""

    places: list[tuple[nn.Module, str]]
    original: nn.Parameter
    ours: nn.Parameter
    tag: str
    owner: str
    part: Delta


def root_site(model: nn.Module) -> Site:
    """The whole model as a site, for prompts and heads."""
    return Site(name="", kind="model", role="model", module=model)


def build_part(adaptation: Adaptation, key: str, part: Delta, everything: list[Site]) -> None:
    """The tensors of one delta at every site that it selects, and the base parameters that it trains."""
    if "model" in part.kinds:
        chosen = [root_site(adaptation.model)]
    else:
        chosen = with_widths(part.chosen(everything), everything)
    shared = part.shared(chosen)
    owner = SiteDelta(part, root_site(adaptation.model), shared, adaptation.dtype) if shared else None
    if owner is not None:
        adaptation.model.add_module(
            f"{PREFIX}{adaptation.name}_{key}_shared", owner.train(adaptation.model.training)
        )
        adaptation.owned[key] = owner
    taps = with_widths(select(everything, part.taps, kinds=part.tap_kinds), everything) if part.taps else []
    if taps and len(chosen) != 1:
        raise UserError(
            f"{type(part).__name__} writes one site; sites={getattr(part, 'sites', 'all')!r} selects {len(chosen)}."
        )
    for site in chosen if set(forms(part)) - {"existing"} or part.slot == "head" else ():
        with dequantized(site.module):  # a start may read the weight
            tensors = part.side_tensors(site, taps) if taps else part.tensors(site)
        t = SiteDelta(part, site, tensors, adaptation.dtype)
        t._shared = () if owner is None else (owner,)
        t.buffer = TapBuffer([s.name for s in taps]) if taps else None
        t.taps = [s.module for s in taps]
        t.listens = part.listens(everything, taps)
        place = site.exit if site.exit is not None else site.module
        suffix = f"_{site.parameter}" if site.parameter else ""
        t.train(place.training)
        place.add_module(f"{PREFIX}{adaptation.name}_{key}{suffix}", t)
        adaptation.sites.append((key, site, t))
    _claim(adaptation, key, part)


def _claim(adaptation: Adaptation, key: str, part: Delta) -> None:
    names = part.existing(adaptation.model)
    params = {
        n: p
        for n, p in adaptation.model.named_parameters(remove_duplicate=False)
        if f".{PREFIX}" not in f".{n}"
    }
    holders: dict[int, list[str]] = {}
    for name, p in params.items():
        holders.setdefault(id(p), []).append(name)
    taken = {id(e.original) for e in adaptation.existing.values()}
    for name, tag in names.items():
        original = params[name]
        if not original.is_floating_point():
            raise UserError(
                f"{type(part).__name__} cannot train {name}: its values are {original.dtype} codes."
            )
        if original.is_meta and device_of(adaptation.model).type != "meta":
            raise UserError(f"{name} is offloaded and cannot be trained there: attach first, then offload.")
        if id(original) in taken:
            continue
        taken.add(id(original))
        where = holders[id(original)]
        places = [(adaptation.model.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2]) for n in where]
        if places[0][1] == "weight" and is_quantized(places[0][0]):
            raise UserError(
                f"{type(part).__name__} cannot train {name}: it is quantized; "
                "load the base model unquantized, or use lora."
            )
        ours = nn.Parameter(original.detach().clone()) if adaptation.undo else original
        adaptation.existing[name] = Existing(places, original, ours, tag, key, part)
