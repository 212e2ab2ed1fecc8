"""What routers did, drawn from the rows that `RouterLog` and the losses on routers leave in metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tunewise.study.report.cells import finite
from tunewise.study.report.charts import INK, curve_chart, styled, svg

__all__ = ["load_chart", "routing_charts"]

Row = Mapping[str, Any]
POINTS, SITES = 40, 24


def routing_charts(runs: Sequence[Row], names: Sequence[str]) -> list[dict[str, str]]:
    """Figures of router entropy, balance, balance loss and expert load; none for runs without routers."""
    curves = (
        ("router/entropy", "Router entropy", "entropy", "0 a sure choice, 1 undecided; mean over layers"),
        ("router/balance", "Balance of experts", "balance", "1 even use; mean over layers"),
        ("balance_loss", "Balance loss", "balance loss", "with its weight; means of a few steps"),
    )
    charts = []
    for key, title, axis, caption in curves:
        points = [
            {"name": str(run["name"]), "step": line["step"], "value": line[key]}
            for run in runs
            for line in run.get("metrics") or ()
            if finite(line.get(key)) and finite(line.get("step"))
        ]
        if points:
            svg_text = curve_chart(points, axis, list(names), POINTS)
            charts.append({"title": title, "caption": caption, "svg": svg_text})
    for run in runs:
        looks = [line for line in run.get("metrics") or () if line.get("router/load")]
        if looks:
            whose = f" of {run['name']}" if len(runs) > 1 else ""
            caption = f"share of each expert at step {looks[-1]['step']}, 1 = even; one row per place"
            figure = load_chart(looks[-1]["router/load"])
            charts.append({"title": f"Expert load{whose}", "caption": caption, "svg": figure})
    return charts


def load_chart(load: Mapping[str, Sequence[float]]) -> str:
    """A heat map, experts across and sites down, of N times the share of an expert; long lists are thinned out."""
    import altair as alt

    sites = list(load)[:: -(-len(load) // SITES)]
    short = _short(sites)
    cells = [
        {"site": name, "expert": i + 1, "load": share * len(load[site])}
        for site, name in zip(sites, short, strict=True)
        for i, share in enumerate(load[site])
    ]
    legend = alt.Legend(title=None, gradientLength=120, labelColor=INK)
    # blue for rare, orange for frequent: the page's own colours, both readable on white and on black
    colours = alt.Scale(domain=[0, 1, 2], range=["#0072b2", "#bbbbbb", "#e69f00"], clamp=True)
    chart = alt.Chart(alt.Data(values=cells)).mark_rect()
    chart = chart.encode(
        x=alt.X("expert:O", title="expert", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
        y=alt.Y("site:N", title=None, sort=short, axis=alt.Axis(labelLimit=130, labelFontSize=9)),
        color=alt.Color("load:Q", scale=colours, legend=legend),
    )
    return svg(styled(chart), "share of each expert by place")


def _short(names: Sequence[str]) -> list[str]:
    """Names without the words that all of them share, each still its own."""
    parts = [name.split(".") for name in names]
    common = [i for i, words in enumerate(zip(*parts, strict=False)) if len(set(words)) == 1]
    short = [".".join(w for i, w in enumerate(words) if i not in common) or words[-1] for words in parts]
    return short if len(set(short)) == len(names) else list(names)
