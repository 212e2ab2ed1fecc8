"""Rebuilds, from the active adaptations, which equations run at which module."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from tunewise.sites import is_quantized

from .delta import ORDER, SiteDelta, TapBuffer, forms
from .forward import HEARD, Plan, forward_of, install, uninstall

if TYPE_CHECKING:
    from .adaptation import Adaptation

__all__ = ["plans_of", "rebuild", "use_plans"]

Entries = dict[nn.Module, list[SiteDelta]]


def _linear_plan(ts: list[SiteDelta], plain: bool) -> Plan:
    """Weight equations become thin `output` twins, one fused product, or one dense W', whichever fits."""
    plan = Plan(inputs=tuple(t for t in ts if "input" in forms(t.part)))
    weighted = sorted((t for t in ts if "weight" in forms(t.part)), key=lambda t: ORDER.index(t.part.order))
    others = [t for t in ts if "output" in forms(t.part) and "weight" not in forms(t.part)]
    thin: list[SiteDelta] = []
    if not plain and len(weighted) == 1 and _fused(weighted[0]):
        plan.product = weighted[0]
    else:
        while weighted and _thin(weighted):
            thin.insert(0, weighted.pop())
        plan.weights = tuple(weighted)
    plan.outputs = (*thin, *others)
    return plan


def _thin(weighted: list[SiteDelta]) -> bool:
    """Whether the last of these may run as its `output` twin."""
    t = weighted[-1]
    stands = len(weighted) == 1 or not t.part.alone
    return stands and "output" in forms(t.part) and t.kind in ("linear", "embedding")


def _fused(t: SiteDelta) -> bool:
    bare = t.kind == "linear" and t.rows is None and not t.transposed and t.share == 1.0
    return bare and "product" in forms(t.part) and not is_quantized(t.root) and t.part.fusable(t)


def plans_of(active: Iterable[Adaptation], plain: bool) -> dict[nn.Module, Plan]:
    """Which equations run at which module when these adaptations are active together."""
    by_module: Entries = defaultdict(list)
    around: Entries = defaultdict(list)
    reads: Entries = defaultdict(list)
    taps: dict[nn.Module, list[tuple[TapBuffer, str, bool]]] = defaultdict(list)
    for _, site, t in (entry for adaptation in active for entry in adaptation.sites):
        place = site.exit if site.exit is not None else site.module
        given = forms(t.part)
        if "around" in given:
            around[place].append(t)
        if "read" in given:
            assert t.buffer is not None
            reads[place].append(t)
            for name, module in zip(t.buffer.sites, t.taps, strict=True):
                taps[module].append((t.buffer, name, False))
            for name, module in t.listens.items():
                taps[module].append((t.buffer, HEARD + name, True))
        elif set(given) & {"input", "weight", "output"}:
            by_module[place].append(t)
            if site.entry is not None and site.entry is not place:
                t.buffer = t.buffer or TapBuffer([site.name])
                taps[site.entry].append((t.buffer, site.name, True))
    plans = {}
    for module in {**by_module, **around, **reads, **taps}:
        plan = plans[module] = _linear_plan(by_module.get(module, []), plain)
        plan.around, plan.reads = tuple(around.get(module, ())), tuple(reads.get(module, ()))
        plan.taps = tuple(taps.get(module, ()))
    return plans


def rebuild(model: nn.Module) -> None:
    """Sets the plan of every module from the active adaptations; modules without one get their own forward
    back.
    """
    from .adaptation import handles

    everyone: list[Adaptation] = list(handles(model).values())
    active = [h for h in everyone if h.active]
    use_plans(model, plans_of(active, any(h.plain for h in active)))
    # the answer of a merged model is still read by its head
    switches = [
        (t.part.switch, t, h.active or (h.merged is not None and t.part.slot == "head"))
        for h in everyone
        for _, _, t in h.sites
    ]
    for switch in {s for s, t, _ in switches if "switch" in forms(t.part)}:
        switch(model, [t for s, t, on in switches if s is switch and on])


def use_plans(model: nn.Module, plans: dict[nn.Module, Plan]) -> None:
    """These plans and no others."""
    from .adaptation import handles

    alive = {t for h in handles(model).values() for _, _, t in h.sites}
    for module in model.modules():
        if module in plans:
            install(module).use(plans[module], alive)
        elif (found := forward_of(module)) is not None:
            if alive:  # an adaptation that is switched off may come back, and compiled code with it
                found.use(Plan(), alive)
            else:
                uninstall(module)
