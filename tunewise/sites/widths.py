"""The widths of container sites, read off the layers inside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .site import Site

__all__ = ["with_widths"]

_ENDS = ("output", "down")


def with_widths(chosen: Sequence[Site], everything: Sequence[Site]) -> list[Site]:
    """The same sites, attention, mlp and block ones with in_features and out_features filled where they can
    be known.

    The input width is that of the first layer at the sub-layer's entry, the output width that of its last
    projection.
    """
    leaves = [s for s in everything if s.kind in ("linear", "norm", "experts") and s.in_features]

    def filled(site: Site) -> Site:
        if site.kind not in ("attention", "mlp", "block") or site.out_features is not None:
            return site
        first = _inside(site.entry or site.module, leaves)
        last = _inside(site.exit or site.module, leaves)
        ends = [s for s in last if s.role in _ENDS] or last
        if not first or not ends:
            return site
        outs = ends[-1].out_features
        ins = outs if site.kind == "block" else first[0].in_features
        return replace(site, in_features=ins, out_features=outs)

    return [filled(site) for site in chosen]


def _inside(module: object, leaves: Sequence[Site]) -> list[Site]:
    below = set(module.modules())  # type: ignore[attr-defined]
    return [s for s in leaves if s.module in below]
