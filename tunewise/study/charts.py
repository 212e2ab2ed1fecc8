"""Charts as inline SVG that need no browser, no network and no script, in light and in dark."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

__all__ = ["PALETTE", "cost_chart", "curve_chart"]

# Okabe and Ito's colours, told apart by colour-blind readers, and all of medium lightness: readable on white and on
# black. Beyond seven methods they repeat with another dash and another symbol.
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c7a00")
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
DASHES = ([1, 0], [6, 3], [2, 2])
INK = "#010203"
WIDTH, HEIGHT = 400, 250
DOTTED = 12

Point = dict[str, Any]


def curve_chart(points: Sequence[Point], y: str, names: Sequence[str], most: int = 300) -> str:
    """Lines of `{"name", "step", "value"}` over the steps, at most `most` points per run; y titles the axis."""
    import altair as alt

    kept = [p for p in _thinned(points, names, most) if math.isfinite(p["value"])]
    lines = alt.Chart(alt.Data(values=kept)).mark_line(strokeWidth=2, point={"size": 22})
    if len(kept) > DOTTED * len(names):
        lines = lines.mark_line(strokeWidth=2)
    chart = lines.encode(
        x=alt.X("step:Q", title="step", axis=alt.Axis(tickCount=5)),
        y=alt.Y("value:Q", title=y, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=5)),
        color=_colour(names),
        strokeDash=alt.StrokeDash("name:N", scale=_scale(names, DASHES, len(PALETTE)), legend=_legend()),
        tooltip=["name:N", "step:Q", "value:Q"],
    )
    return _svg(chart, f"{y} by step")


def cost_chart(points: Sequence[Point], x: str, y: str, names: Sequence[str]) -> str:
    """Quality over cost: `{"name", "x", "y", "low", "high"}` with the interval as a bar; x is logarithmic."""
    import altair as alt

    kept = [p for p in points if p["x"] > 0 and math.isfinite(p["y"])]
    base = alt.Chart(alt.Data(values=kept)).encode(
        x=alt.X("x:Q", title=x, scale=alt.Scale(type="log", nice=True), axis=alt.Axis(tickCount=4, format="~s")),
        color=_colour(names),
    )
    ranges = base.mark_rule(strokeWidth=1.5).encode(
        y=alt.Y("low:Q", title=y, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=5)), y2="high:Q"
    )
    dots = base.mark_point(size=90, filled=True, opacity=1).encode(
        y="y:Q",
        shape=alt.Shape("name:N", scale=_scale(names, SHAPES, len(PALETTE)), legend=_legend()),
        tooltip=["name:N", "x:Q", "y:Q"],
    )
    bars = [ranges] if all(p.get("low") is not None and p.get("high") is not None for p in kept) else []
    return _svg(alt.layer(*bars, dots), f"{y} by {x}")


def _legend() -> Any:
    import altair as alt

    return alt.Legend(title=None, orient="bottom", columns=3, symbolOpacity=1, labelLimit=150)


def _colour(names: Sequence[str]) -> Any:
    import altair as alt

    return alt.Color("name:N", scale=_scale(names, PALETTE, 1), legend=_legend())


def _scale(names: Sequence[str], values: Sequence[Any], each: int) -> Any:
    """The i-th name gets value i // each, round and round: colours change first, then dashes and symbols."""
    import altair as alt

    return alt.Scale(
        domain=list(names), range=[values[(i // each) % len(values)] for i in range(len(names))]
    )


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
        axis={"labelColor": INK, "titleColor": INK, "gridColor": INK, "gridOpacity": 0.12, "domainColor": INK,
              "tickColor": INK, "domainOpacity": 0.5, "tickOpacity": 0.5, "labelFontSize": 12, "titleFontSize": 12,
              "titleFontWeight": "normal", "labelOverlap": True},
        legend={"labelColor": INK, "labelFontSize": 12, "symbolStrokeWidth": 2},
        view={"stroke": None},
    )  # fmt: skip
    svg: str = vl_convert.vegalite_to_svg(styled.to_dict())
    head = re.search(r'<svg[^>]*?width="([\d.]+)"[^>]*?height="([\d.]+)"[^>]*>', svg)
    assert head is not None
    w, h = head.groups()
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" role="img" aria-label="{_attribute(title)}">'
    return opening + svg[head.end() :].replace(INK, "currentColor")


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
