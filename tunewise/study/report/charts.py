"""Charts as inline SVG that need no browser, no network and no script, in light and in dark."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "HEIGHT",
    "INK",
    "WIDTH",
    "Look",
    "cost_chart",
    "curve_chart",
    "looks",
    "scale",
    "styled",
    "svg",
    "swatch",
    "thinned",
]

# Okabe and Ito's colours: colour-blind readers tell them apart, and they are readable on white and on black.
# Beyond seven names they repeat with another dash and another symbol.
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c7a00")
SHAPES = ("circle", "square", "triangle-up", "diamond")
BASELINE_SHAPES = ("cross", "triangle-down", "triangle-left", "triangle-right")
SYMBOLS = {
    "circle": '<circle cx="14" cy="7" r="4"/>',
    "square": '<path d="M10 3h8v8h-8z"/>',
    "triangle-up": '<path d="M14 2l5 9h-10z"/>',
    "diamond": '<path d="M14 2l5 5-5 5-5-5z"/>',
    "cross": '<path d="M12.5 2h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5v-3h3.5z"/>',
    "triangle-down": '<path d="M14 12l5-9h-10z"/>',
    "triangle-left": '<path d="M9 7l9-5v10z"/>',
    "triangle-right": '<path d="M19 7l-9-5v10z"/>',
}
DASHES = ((1, 0), (6, 3), (2, 2), (8, 2))
INK = "#010203"
WIDTH, HEIGHT = 400, 250
DOTTED = 12

Point = dict[str, Any]


@dataclass(frozen=True)
class Look:
    """How one name is drawn, the same in every chart."""

    colour: str
    dash: tuple[int, int]
    shape: str
    lines: bool = True


def looks(names: Sequence[str], baselines: Sequence[str] = ()) -> dict[str, Look]:
    """Colours change first, then dashes and symbols; baselines have the page's ink and symbols of their own."""
    turn = len(PALETTE)
    found = {
        name: Look(PALETTE[i % turn], DASHES[i // turn % len(DASHES)], SHAPES[i // turn % len(SHAPES)])
        for i, name in enumerate(names)
    }
    for i, name in enumerate(baselines):
        found[name] = Look(INK, DASHES[0], BASELINE_SHAPES[i % len(BASELINE_SHAPES)], lines=False)
    return found


def swatch(look: Look) -> str:
    """Its line and symbol, for a legend."""
    colour = look.colour.replace(INK, "currentColor")
    dash = " ".join(map(str, look.dash))
    line = f'<path d="M0 7h28" stroke-dasharray="{dash}"/>' if look.lines else ""
    return (
        f'<svg width="28" height="14" aria-hidden="true" fill="{colour}" stroke="{colour}" stroke-width="2">'
        f"{line}{SYMBOLS[look.shape]}</svg>"
    )


def curve_chart(points: Sequence[Point], y: str, names: Sequence[str], most: int = 300) -> str:
    """Lines of `{"name", "step", "value"}` over the steps, at most `most` points each; y titles the axis."""
    import altair as alt

    kept = [p for p in thinned(points, names, most) if math.isfinite(p["value"])]
    dots = {"size": 22} if len(kept) <= DOTTED * len(names) else False
    chart = alt.Chart(alt.Data(values=kept)).mark_line(strokeWidth=2, point=dots)
    chart = chart.encode(
        x=alt.X("step:Q", title="step", axis=alt.Axis(tickCount=5)),
        y=alt.Y("value:Q", title=y, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=5)),
        color=alt.Color("name:N", scale=scale(looks(names), "colour"), legend=None),
        strokeDash=alt.StrokeDash("name:N", scale=scale(looks(names), "dash"), legend=None),
    )
    return svg(styled(chart), f"{y} by step")


def cost_chart(points: Sequence[Point], x: str, y: str, names: Sequence[str]) -> str:
    """Quality over cost: `{"name", "x", "y", "low", "high"}` with the interval as a bar; x is logarithmic."""
    import altair as alt

    axis = alt.Axis(tickCount=4, format="~s" if max(p["x"] for p in points) >= 1e4 else "~g")
    base = alt.Chart(alt.Data(values=list(points))).encode(
        x=alt.X("x:Q", title=x, scale=alt.Scale(type="log", nice=True), axis=axis),
        color=alt.Color("name:N", scale=scale(looks(names), "colour"), legend=None),
    )
    free = alt.Scale(zero=False)
    ranges = base.mark_rule(strokeWidth=1.5).encode(
        y=alt.Y("low:Q", title=y, scale=free, axis=alt.Axis(tickCount=5)), y2="high:Q"
    )
    shape = alt.Shape("name:N", scale=scale(looks(names), "shape"), legend=None)
    dots = base.mark_point(size=90, filled=True, opacity=1).encode(
        y=alt.Y("y:Q", title=y, scale=free, axis=alt.Axis(tickCount=5)), shape=shape
    )
    known = all(p.get("low") is not None and p.get("high") is not None for p in points)
    return svg(styled(alt.layer(ranges, dots) if known else dots), f"{y} by {x}")


def scale(looks: Mapping[str, Look], what: str, keys: Sequence[Any] = ()) -> Any:
    """The scale from names, or from the keys that stand for them, to their "colour", "dash" or "shape"."""
    import altair as alt

    return alt.Scale(domain=list(keys or looks), range=[getattr(look, what) for look in looks.values()])


def thinned(points: Sequence[Point], names: Sequence[Any], most: int) -> list[Point]:
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


def styled(chart: Any) -> dict[str, Any]:
    """The Vega-Lite specification with the page's style; its ink is `INK`, to be put in the page's colour."""
    axis = {
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
    }
    made = chart.properties(width=WIDTH, height=HEIGHT, background="transparent").configure(
        font="system-ui, sans-serif", axis=axis, view={"stroke": None}
    )
    specification: dict[str, Any] = made.to_dict()
    return specification


def svg(specification: dict[str, Any], title: str) -> str:
    """The SVG of a `styled` chart, its ink in the page's colour, scaling with the page."""
    import vl_convert

    text: str = vl_convert.vegalite_to_svg(specification)
    head = re.search(r'<svg[^>]*?width="([\d.]+)"[^>]*?height="([\d.]+)"[^>]*>', text)
    assert head is not None
    size = f'viewBox="0 0 {head.group(1)} {head.group(2)}"'
    label = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{label}">'
    return opening + text[head.end() :].replace(INK, "currentColor")
