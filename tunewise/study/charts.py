"""Charts as inline SVG that need no browser, no network and no script, in light and in dark."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

__all__ = ["cost_chart", "curve_chart", "swatch"]

# Okabe and Ito's colours: colour-blind readers tell them apart, and they are readable on white and on black.
# Beyond seven names they repeat with another dash and another symbol.
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c7a00")
SHAPES = ("circle", "square", "triangle-up", "diamond")
SYMBOLS = (
    '<circle cx="14" cy="7" r="4"/>',
    '<path d="M10 3h8v8h-8z"/>',
    '<path d="M14 2l5 9h-10z"/>',
    '<path d="M14 2l5 5-5 5-5-5z"/>',
)
DASHES = ((1, 0), (6, 3), (2, 2), (8, 2))
INK = "#010203"
WIDTH, HEIGHT = 400, 250
DOTTED = 12

Point = dict[str, Any]


def swatch(index: int) -> str:
    """The line and symbol of the i-th name, for a legend: colours change first, then dashes and symbols."""
    colour, turn = PALETTE[index % len(PALETTE)], index // len(PALETTE) % len(SHAPES)
    dash = " ".join(map(str, DASHES[turn]))
    return (
        f'<svg width="28" height="14" aria-hidden="true" fill="{colour}" stroke="{colour}" stroke-width="2">'
        f'<path d="M0 7h28" stroke-dasharray="{dash}"/>{SYMBOLS[turn]}</svg>'
    )


def curve_chart(points: Sequence[Point], y: str, names: Sequence[str], most: int = 300) -> str:
    """Lines of `{"name", "step", "value"}` over the steps, at most `most` points each; y titles the axis."""
    import altair as alt

    kept = [p for p in _thinned(points, names, most) if math.isfinite(p["value"])]
    dots = {"size": 22} if len(kept) <= DOTTED * len(names) else False
    chart = alt.Chart(alt.Data(values=kept)).mark_line(strokeWidth=2, point=dots)
    chart = chart.encode(
        x=alt.X("step:Q", title="step", axis=alt.Axis(tickCount=5)),
        y=alt.Y("value:Q", title=y, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=5)),
        color=alt.Color("name:N", scale=_scale(names, PALETTE, 1), legend=None),
        strokeDash=alt.StrokeDash("name:N", scale=_scale(names, DASHES, len(PALETTE)), legend=None),
    )
    return _svg(chart, f"{y} by step")


def cost_chart(points: Sequence[Point], x: str, y: str, names: Sequence[str]) -> str:
    """Quality over cost: `{"name", "x", "y", "low", "high"}` with the interval as a bar; x is logarithmic."""
    import altair as alt

    axis = alt.Axis(tickCount=4, format="~s" if max(p["x"] for p in points) >= 1e4 else "~g")
    base = alt.Chart(alt.Data(values=list(points))).encode(
        x=alt.X("x:Q", title=x, scale=alt.Scale(type="log", nice=True), axis=axis),
        color=alt.Color("name:N", scale=_scale(names, PALETTE, 1), legend=None),
    )
    scale = alt.Scale(zero=False)
    ranges = base.mark_rule(strokeWidth=1.5).encode(
        y=alt.Y("low:Q", title=y, scale=scale, axis=alt.Axis(tickCount=5)), y2="high:Q"
    )
    shape = alt.Shape("name:N", scale=_scale(names, SHAPES, len(PALETTE)), legend=None)
    dots = base.mark_point(size=90, filled=True, opacity=1).encode(
        y=alt.Y("y:Q", title=y, scale=scale, axis=alt.Axis(tickCount=5)), shape=shape
    )
    known = all(p.get("low") is not None and p.get("high") is not None for p in points)
    return _svg(alt.layer(ranges, dots) if known else dots, f"{y} by {x}")


def _scale(names: Sequence[str], values: Sequence[Any], each: int) -> Any:
    import altair as alt

    chosen = [values[(i // each) % len(values)] for i in range(len(names))]
    return alt.Scale(domain=list(names), range=chosen)


def _thinned(points: Sequence[Point], names: Sequence[str], most: int) -> list[Point]:
    """At most `most` per run: means of equal stretches, so that a long run is not a black band."""
    kept: list[Point] = []
    for name in names:
        own = [p for p in points if p["name"] == name]
        stride = max(1, math.ceil(len(own) / most))
        for start in range(0, len(own), stride):
            part = own[start : start + stride]
            mean = sum(p["value"] for p in part) / len(part)
            kept.append({"name": name, "step": part[-1]["step"], "value": mean})
    return kept


def _svg(chart: Any, title: str) -> str:
    """The SVG, its ink in the page's colour, scaling with the page."""
    import vl_convert

    styled = chart.properties(width=WIDTH, height=HEIGHT, background="transparent").configure(
        font="system-ui, sans-serif",
        axis={
            "labelColor": INK,
            "titleColor": INK,
            "gridColor": INK,
            "gridOpacity": 0.12,
            "domainColor": INK,
            "tickColor": INK,
            "domainOpacity": 0.5,
            "tickOpacity": 0.5,
            "labelFontSize": 12,
            "titleFontSize": 12,
            "titleFontWeight": "normal",
            "titlePadding": 10,
            "labelOverlap": True,
        },
        view={"stroke": None},
    )
    svg: str = vl_convert.vegalite_to_svg(styled.to_dict())
    head = re.search(r'<svg[^>]*?width="([\d.]+)"[^>]*?height="([\d.]+)"[^>]*>', svg)
    assert head is not None
    size = f'viewBox="0 0 {head.group(1)} {head.group(2)}"'
    label = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{label}">'
    return opening + svg[head.end() :].replace(INK, "currentColor")
