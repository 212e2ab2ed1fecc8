"""The charts of a comparison: quality over each cost, and learning curves; live with a still picture of each."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunewise.study.judge.pareto import Objective, front, quality
from tunewise.study.report.axes import CostAxis, cost_axis
from tunewise.study.report.cells import finite, interval, score
from tunewise.study.report.charts import HEIGHT, INK, WIDTH, Look, scale, styled, svg, thinned

__all__ = ["Drawn", "chart_data", "curves", "tradeoff"]

Row = Mapping[str, Any]
LIVE_HEIGHT, LABEL_WIDTH, LINE = 340, 110, 14
BEST_POINTS, OTHER_POINTS = 40, 20
SPREADS = 3.0
# What a value is counted in, beside the rounded way in which the table writes it.
EXACT = {
    "peak_memory_mb": " MiB",
    "seconds": " s",
    "trainable": "",
    "size_mb": " MiB",
    "inference_seconds": " s for 1,000 rows",
    "forgetting": " nats",
}
PICKING = "length(picked) > 0"


@dataclass(frozen=True)
class Drawn:
    """`still` is SVG; `live` is the same chart's Vega-Lite specification as JSON; `said` tells what is not in it."""

    title: str
    still: str
    live: str
    said: str = ""


def chart_data(drawn: Sequence[Drawn]) -> str:
    """The live charts as one JSON array that is safe inside a <script> element."""
    text = f"[{','.join(d.live for d in drawn)}]"
    # Only strings can hold these characters, and there the escapes mean the same.
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def tradeoff(
    rows: Sequence[Row],
    cost: Objective,
    metric: str,
    higher_is_better: bool,
    looks: Mapping[str, Look],
) -> Drawn | None:
    """Quality over one cost, the front of these two as steps; None where fewer than two rows have both."""
    both = [r for r in rows if finite(r.get(metric)) and finite(r.get(cost.key))]
    shown = _near(both, metric, higher_is_better)
    if len(shown) < 2:
        return None
    best = {id(r) for r in front(shown, [quality(metric, higher_is_better), cost]).on}
    axis = cost_axis([float(r[cost.key]) for r in shown], cost.key)
    keys = {name: i for i, name in enumerate(looks)}
    points = [_point(r, cost, metric, axis, keys, id(r) in best) for r in shown]
    _label(points, axis)
    noun = cost.noun + {"inference_seconds": " (1,000 rows)", "forgetting": " (nats)"}.get(cost.key, "")
    chart = _tradeoff_chart(points, noun, metric, axis, looks)
    far = [f"{r['method']} ({score(r[metric])})" for r in both if r not in shown]
    unknown = [str(r["method"]) for r in rows if finite(r.get(metric)) and not finite(r.get(cost.key))]
    said = f" Outside the chart: {', '.join(far)}." if far else ""
    said += f" {_capital(cost.noun)} is not known of {', '.join(unknown)}." if unknown else ""
    return _drawn(chart, _capital(cost.noun), f"{metric} by {noun}", said.strip())


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _drawn(chart: Any, title: str, label: str, said: str = "") -> Drawn:
    still = styled(chart)
    # Without its schema the viewer takes its own version, which is the one that came with it.
    live = {key: value for key, value in still.items() if key != "$schema"}
    live |= {"description": label, "width": "container", "height": LIVE_HEIGHT}
    live["autosize"] = {"type": "fit-x", "contains": "padding"}
    text = json.dumps(live, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Drawn(title, svg(still, label), text.replace(INK, "currentColor"), said)


def _near(rows: Sequence[Row], metric: str, higher_is_better: bool) -> list[Row]:
    """Rows not so far behind that those ahead would melt into one point."""
    if not rows:
        return []
    sign = 1 if higher_is_better else -1
    best = max(rows, key=lambda r: sign * r[metric])
    low, high = best.get(f"{metric}_low"), best.get(f"{metric}_high")
    width = high - low if low is not None and high is not None else 0.0
    spread = max(sign * (best[metric] - statistics.median(r[metric] for r in rows)), width)
    return [r for r in rows if not spread or sign * (best[metric] - r[metric]) <= SPREADS * spread]


def _point(
    row: Row, cost: Objective, metric: str, axis: CostAxis, keys: Mapping[str, int], on_front: bool
) -> dict[str, Any]:
    known, value, name = interval(row, metric), float(row[cost.key]), str(row["method"])
    point = {
        "k": keys[name],
        "x": value,
        "y": row[metric],
        "front": on_front,
        "method": name,
        "quality": f"{row[metric]:.5g}" + (f" ({known})" if known else ""),
        "cost": f"{cost.show(value)} ({round(value, 4):,.12g}{EXACT.get(cost.key, '')})",
        "rate": f"{row['lr']:.3g}" if finite(row.get("lr")) else "none",
        "overall": "yes" if row.get("front") else "no",
    }
    if known:
        point |= {"low": row[f"{metric}_low"], "high": row[f"{metric}_high"]}
    return point


def _label(points: Sequence[dict[str, Any]], axis: CostAxis) -> None:
    """Writes names beside points of the front, best ones first, where there is room; `side` is "" where not."""
    ends = [v for p in points for v in (p["y"], p.get("low", p["y"]), p.get("high", p["y"]))]
    height = (max(ends) - min(ends)) or 1.0
    taken: list[tuple[float, float]] = []
    for point in points:
        point["side"] = ""
        if not point["front"]:
            continue
        x, y = axis.place(point["x"]) * WIDTH, (point["y"] - min(ends)) / height * HEIGHT
        width = min(LABEL_WIDTH, 6.5 * len(point["method"])) + 8
        # Towards the middle, where no name is cut off at the edge.
        middle, side = (x - width / 2, "left") if x > 0.3 * WIDTH else (x + width / 2, "right")
        if all(abs(middle - a) > LABEL_WIDTH or abs(y - b) > LINE for a, b in taken):
            point["side"] = side
            taken.append((middle, y))


def _opacity(*pale: tuple[str, float]) -> Any:
    import altair as alt

    tests = [(f"{PICKING} && indexof(picked, datum.k) < 0", 0.07), (PICKING, 1), *pale]
    return alt.OpacityValue(1, condition=[{"test": test, "value": value} for test, value in tests])


def _tradeoff_chart(
    points: Sequence[dict[str, Any]], x: str, y: str, axis: CostAxis, looks: Mapping[str, Look]
) -> Any:
    import altair as alt

    keys = list(range(len(looks)))
    base = alt.Chart().encode(
        x=alt.X("x:Q", title=x, scale=alt.Scale(**axis.scale()), axis=alt.Axis(**axis.axis())),
        y=alt.Y("y:Q", title=y, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=5)),
    )
    steps = (
        base.transform_filter("datum.front")
        .mark_line(interpolate="step-after", strokeWidth=1.5, color=INK, opacity=0.35)
        .encode(order="x:Q")
    )
    colour = alt.Color("k:N", scale=scale(looks, "colour", keys), legend=None)
    tips = [("method", "method"), ("quality", y), ("cost", x), ("rate", "learning rate")]
    tips.append(("overall", "on the front of all costs"))
    dots = base.mark_point(size=110, filled=True).encode(
        color=colour,
        shape=alt.Shape("k:N", scale=scale(looks, "shape", keys), legend=None),
        opacity=_opacity(("!datum.front", 0.45)),
        tooltip=[alt.Tooltip(f"{field}:N", title=title) for field, title in tips],
    )
    layers = [steps, dots]
    if any("low" in p for p in points):
        bars = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=1.5)
        layers.insert(
            1,
            bars.encode(y="low:Q", y2="high:Q", color=colour, opacity=_opacity(("!datum.front", 0.3))),
        )
    sides: dict[str, dict[str, Any]] = {
        "left": {"align": "right", "dx": -8},
        "right": {"align": "left", "dx": 8},
    }
    for side, place in sides.items():
        if all(p["side"] != side for p in points):
            continue
        named = base.transform_filter(f"datum.side == '{side}'")
        words = named.mark_text(dy=-9, limit=LABEL_WIDTH, fontSize=11.5, color=INK, **place)
        layers.append(words.encode(text="method:N", opacity=_opacity()))
    picked = alt.param(name="picked", value=[])
    return alt.layer(*layers, data=alt.Data(values=list(points))).add_params(picked)


def curves(
    trials: Sequence[Row], key: str, title: str, chosen: Mapping[str, Any], looks: Mapping[str, Look]
) -> Drawn | None:
    """One line per configuration of what its curve tells under `key`; `chosen` are the rates drawn in full.

    Trials of one method, rate and seed are one line: a later rung goes on where the earlier one stopped.
    """
    lines = _lines(trials, key)
    if not lines:
        return None
    keys = {name: i for i, name in enumerate(looks)}
    points, words = [], []
    for t, ((method, rate, seed), line) in enumerate(lines.items()):
        full = rate == chosen.get(method)
        own = [{"name": t, "step": s, "value": v} for s, v in line.items()]
        points += [
            {"k": keys[method], "t": t, "s": p["step"], "v": float(f"{p['value']:.5g}"), "full": full}
            for p in thinned(own, [t], BEST_POINTS if full else OTHER_POINTS)
        ]
        shown = f"{rate:.3g}" if finite(rate) else "none"
        words.append(f"{shown}, seed {seed}, {score(list(line.values())[-1])} after {max(line):,} steps")
    kept = _inside(points)
    chart = _curve_chart(kept, title, looks, words)
    said = "Values far outside are cut off." if len(kept) < len(points) else ""
    return _drawn(chart, _capital(title), f"{title} by step", said)


def _lines(trials: Sequence[Row], key: str) -> dict[tuple[str, Any, Any], dict[Any, float]]:
    """(method, rate, seed) -> step -> value, where there are two steps to join."""
    lines: dict[tuple[str, Any, Any], dict[Any, float]] = {}
    for trial in trials:
        line = lines.setdefault((str(trial["method"]), trial.get("lr"), trial.get("seed")), {})
        for point in trial.get("curve") or ():
            if finite(point.get(key)) and finite(point.get("step")):
                line[point["step"]] = float(point[key])
    return {config: dict(sorted(line.items())) for config, line in lines.items() if len(line) > 1}


def _inside(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what a diverging trial wrote, beside which all other lines would be flat."""
    usual = [p["v"] for p in points if p["full"]] or sorted(p["v"] for p in points)[: -(-len(points) // 2)]
    low, high = min(usual), max(usual)
    room = 2 * (high - low) or abs(high) or 1.0
    return [p for p in points if low - room <= p["v"] <= high + room]


def _curve_chart(
    points: Sequence[dict[str, Any]], title: str, looks: Mapping[str, Look], words: Sequence[str]
) -> Any:
    import altair as alt

    keys = list(range(len(looks)))
    base = (
        alt.Chart()
        .transform_calculate(method="names[datum.k]", configuration="configurations[datum.t]")
        .encode(
            x=alt.X("s:Q", title="step", axis=alt.Axis(tickCount=5)),
            y=alt.Y("v:Q", title=title, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=5)),
            color=alt.Color("k:N", scale=scale(looks, "colour", keys), legend=None),
            strokeDash=alt.StrokeDash("k:N", scale=scale(looks, "dash", keys), legend=None),
            detail="t:N",
            tooltip=[alt.Tooltip("method:N"), alt.Tooltip("configuration:N", title="learning rate")],
        )
    )
    layers = []
    for full, test, width, pale in (
        (False, "!datum.full", 1.2, [("true", 0.4)]),
        (True, "datum.full", 2.2, []),
    ):
        if any(p["full"] == full for p in points):
            lines = base.transform_filter(test).mark_line(strokeWidth=width)
            layers.append(lines.encode(opacity=_opacity(*pale)))
    known = {"picked": [], "names": list(looks), "configurations": list(words)}
    parameters = [alt.param(name=name, value=value) for name, value in known.items()]
    return alt.layer(*layers, data=alt.Data(values=list(points))).add_params(*parameters)
