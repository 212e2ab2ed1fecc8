"""Rebuilds, from the active adaptations, which equations run at which module."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from torch import nn

from .delta import ORDER, SiteDelta, TapBuffer, forms
from .forward import Plan, forward_of, install, is_quantized, uninstall

if TYPE_CHECKING:
    from .adaptation import Adaptation

__all__ = ["rebuild"]

Entries = dict[nn.Module, list[SiteDelta]]


def _ordered(ts: list[SiteDelta]) -> list[SiteDelta]:
    return sorted(ts, key=lambda t: ORDER.index(t.part.order))


def _linear_plan(ts: list[SiteDelta], plain: bool) -> Plan:
    """Weight equations become thin `output` twins, one fused product, or one dense W', whichever fits."""
    plan = Plan(inputs=tuple(t for t in ts if "input" in forms(t.part)))
    weighted = _ordered([t for t in ts if "weight" in forms(t.part)])
    others = [t for t in ts if "output" in forms(t.part) and "weight" not in forms(t.part)]
    alone = weighted[0] if len(weighted) == 1 and weighted[0].kind == "linear" else None
    fused = (
        alone is not None and "product" in forms(alone.part) and alone.rows is None and not alone.transposed
    )
    if (
        fused
        and not plain
        and alone is not None
        and not is_quantized(alone.root)
        and alone.part.fusable(alone)
    ):
        plan.product = alone
        thin: list[SiteDelta] = []
    else:
        thin = []
        while (
            weighted and "output" in forms(weighted[-1].part) and weighted[-1].kind in ("linear", "embedding")
        ):
            thin.insert(0, weighted.pop())
        plan.weights = tuple(weighted)
    plan.outputs = (*thin, *others)
    return plan


def rebuild(model: nn.Module) -> None:
    """Sets the plan of every module from the active adaptations; modules without one get their own forward
    back.
    """
    from .adaptation import handles

    active: list[Adaptation] = [h for h in handles(model).values() if h.active]
    by_module: Entries = defaultdict(list)
    around: Entries = defaultdict(list)
    reads: Entries = defaultdict(list)
    taps: dict[nn.Module, list[tuple[TapBuffer, str, bool]]] = defaultdict(list)
    for adaptation in active:
        for _, site, t in adaptation.sites:
            place = site.exit if site.exit is not None else site.module
            given = forms(t.part)
            if "around" in given:
                around[place].append(t)
            if "read" in given:
                assert t.buffer is not None
                reads[place].append(t)
                for name, module in zip(t.buffer.sites, t.taps, strict=True):
                    taps[module].append((t.buffer, name, False))
            elif set(given) & {"input", "weight", "output"}:
                by_module[place].append(t)
                if site.entry is not None and site.entry is not place:
                    t.buffer = t.buffer or TapBuffer([site.name])
                    taps[site.entry].append((t.buffer, site.name, True))
    plain = any(h.plain for h in active)
    alive = {t for h in handles(model).values() for _, _, t in h.sites}
    wanted: set[nn.Module] = {*by_module, *around, *reads, *taps}
    for module in model.modules():
        if module in wanted:
            plan = _linear_plan(by_module.get(module, []), plain)
            plan.around, plan.reads = tuple(around.get(module, ())), tuple(reads.get(module, ()))
            plan.taps = tuple(taps.get(module, ()))
            install(module).use(plan, alive)
        elif (found := forward_of(module)) is not None:
            if alive:  # an adaptation that is switched off may come back, and compiled code with it
                found.use(Plan(), alive)
            else:
                uninstall(module)
    switches = [(t.part.switch, t, h.active) for h in handles(model).values() for _, _, t in h.sites]
    for switch in {s for s, t, _ in switches if "switch" in forms(t.part)}:
        switch(model, [t for s, t, on in switches if s is switch and on])
    _hide_from_saving(model)


def _hide_from_saving(model: nn.Module) -> None:
    """Anyone's `save_pretrained` writes the base's tensors only."""
    hidden: list[str] = [k for k in model.state_dict(keep_vars=True) if ".tw_" in f".{k}"]
    ignored: Any = getattr(model, "_keys_to_ignore_on_save", None) or ()
    own = {k for k in ignored if ".tw_" not in f".{k}"}
    if hasattr(model, "save_pretrained") and (hidden or len(own) < len(ignored)):
        model.__dict__["_keys_to_ignore_on_save"] = own | set(hidden)
