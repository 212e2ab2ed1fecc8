"""y = base + sum_i w_i (change of adaptation i): several attached adaptations at once, each with a weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from tunewise.core.adaptation import handles
from tunewise.core.delta import SiteDelta, forms
from tunewise.core.errors import UserError, did_you_mean
from tunewise.core.handle import Handle
from tunewise.sites import Site, device_of, read_weight

__all__ = ["attached", "mix"]

SHARELESS = {
    "mask": "a mask holds entries or lets them go",
    "prune": "pruned entries are gone or not",
    "quantize": "rounding happens or does not",
}


def attached(model: nn.Module, name: str) -> Handle:
    """The adaptation of that name; raises `UserError` with near names, and for one that is merged."""
    found = handles(model)
    if name not in found:
        raise UserError(f'The model has no adaptation called "{name}"{did_you_mean(name, found)}')
    merged = next((h.name for h in found.values() if h.merged is not None), None)
    if merged is not None:
        raise UserError(f'The adaptation "{merged}" is merged into the model; unmerge it first.')
    return found[name]  # type: ignore[no-any-return]


@torch.no_grad()
def mix(model: nn.Module, weights: Mapping[str, float]) -> None:
    """y = base + sum_i w_i (change_i): these adaptations are active, each with its weight; all others are off.

    At a layer the change is W' - W or y' - y of the adaptation's equations; 1 is the adaptation as it is
    (bit-equal to `activate`), 0 the base, and weights may be negative or above 1. Calling it again changes the
    weights; `handle.activate()` ends the mix. Weights belong to the model in memory: they are not saved, and
    `materialize` and `export` give each adaptation's whole change.
    Raises `UserError`, and changes nothing, for what has no share (masks, prompts, prefixes, trained weights of
    the base, heads of their own), and where changes do not add up: several adaptations at one layer, of which
    one depends on what it changes.
    """
    if not weights:
        raise UserError("A mix needs the name and weight of at least one adaptation.")
    chosen = {name: attached(model, name) for name in weights}
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
            raise UserError(f'The weight of "{name}" in the mix must be a finite number, not {weight!r}.')
    for name, handle in chosen.items():
        reason = _shareless(handle)
        if reason:
            raise UserError(f'"{name}" cannot be mixed: {reason}.')
    _refuse_clashes(list(chosen.values()))
    for i, (name, handle) in enumerate(chosen.items()):
        handle.activate(only=i == 0, share=float(weights[name]))


def _shareless(handle: Handle) -> str | None:
    """Why no share of this adaptation's change can be taken, or None."""
    if handle.existing:
        return f"it trains {next(iter(handle.existing))} of the base itself, which is either there or not"
    if handle.committed:
        return f"its start changed {next(iter(handle.committed))} of the base, which no weight undoes"
    for _, part in handle.deltas:
        kind, given = type(part).__name__, set(forms(part))
        if given & {"around", "switch"}:
            return f"{kind} adds positions to the input, of which there is no share"
        if part.order in SHARELESS and "weight" in given:
            return f"{SHARELESS[part.order]}, and {kind} is of that kind"
        if part.slot == "head" and any(t.meta for _, _, t in handle.sites if t.part is part):
            return f"{kind} reads the answer outside the model, with tensors of its own"
    return None


def _refuse_clashes(chosen: list[Handle]) -> None:
    """Several at one place must add up: each one's change may not depend on what the others have changed."""
    places: dict[Any, dict[str, list[tuple[Site, SiteDelta]]]] = {}
    for handle in chosen:
        for _, site, t in handle.sites:
            place = (site.exit if site.exit is not None else site.module, t.parameter)
            places.setdefault(place, {}).setdefault(handle.name, []).append((site, t))
    known: dict[int, bool] = {}
    for users in places.values():
        for name, ts in users.items() if len(users) > 1 else ():
            for site, t in ts:
                if id(t.part) not in known:
                    known[id(t.part)] = _adds_up(site, t)
                if not known[id(t.part)]:
                    other = next(n for n in users if n != name)
                    raise UserError(
                        f'"{name}" and "{other}" cannot be mixed: both act at {t.site_name}, where the change of '
                        f"{type(t.part).__name__} depends on what it changes, so that they do not add up."
                    )


def _adds_up(site: Site, t: SiteDelta) -> bool:
    """Whether the change stays the same when the weight, or the output without it, is another one."""
    given, was = forms(t.part), t.training
    unknown = site.in_features is None or site.out_features is None
    if "input" in given or "read" in given or ("weight" not in given and unknown):
        return False
    t.eval()
    try:
        if "weight" in given:
            whole = read_weight(t.root, t.parameter).detach().to(t.dtype)
            whole = whole.transpose(-1, -2) if t.transposed else whole
            start = whole if t.rows is None else whole.index_select(-2, t.rows)
            return _same_change(lambda w: t.part.weight(t, w), start)
        x, y = _example(site, t)
        return _same_change(lambda v: t.part.output(t, x, v), y)
    finally:
        t.train(was)


def _example(site: Site, t: SiteDelta) -> tuple[Tensor, Tensor]:
    """Some input of the site, and an output of its width."""
    make = torch.Generator().manual_seed(0)
    device = device_of(t.root)
    y = torch.randn(3, site.out_features or 0, generator=make).to(device, t.dtype)
    if t.kind == "embedding":
        return torch.zeros(3, dtype=torch.long, device=device), y
    return torch.randn(3, site.in_features or 0, generator=make).to(device, t.dtype), y


def _same_change(change: Any, start: Tensor) -> bool:
    make = torch.Generator().manual_seed(1)
    moved = start + torch.randn(start.shape, generator=make).to(start) * start.std()
    first, second = change(start) - start, change(moved) - moved
    allowed = 1e-4 * float(start.abs().max() + first.abs().max())
    return float((first - second).abs().max()) <= allowed
