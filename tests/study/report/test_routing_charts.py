"""What routers did stands in the report as plots, and nowhere else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tunewise.study.report.routing_charts import load_chart, routing_charts
from tunewise.study.report.run_report import write_report


def run(name: str = "mola") -> dict[str, Any]:
    load = {f"roberta.encoder.layer.{i}.output.dense": [0.5, 0.3, 0.2] for i in range(4)}
    looks = [
        {"step": s, "router/entropy": 0.9 - s / 100, "router/balance": 1.1, "router/load": load}
        for s in (2, 4)
    ]
    steps = [{"step": s, "loss": 1.0, "balance_loss": 0.001 * s} for s in range(1, 5)]
    return {"name": name, "metrics": [*steps, *looks]}


def test_four_figures_of_a_routed_run() -> None:
    charts = routing_charts([run()], ["mola"])
    assert [c["title"] for c in charts] == [
        "Router entropy",
        "Balance of experts",
        "Balance loss",
        "Expert load",
    ]
    assert "step 4" in charts[-1]["caption"]
    assert all(c["svg"].startswith("<svg") and "#010203" not in c["svg"] for c in charts)


def test_none_for_other_runs() -> None:
    assert routing_charts([{"name": "lora", "metrics": [{"step": 1, "loss": 1.0}]}], ["lora"]) == []


def test_two_runs_share_curves_and_have_their_own_load() -> None:
    charts = routing_charts([run(), run("loramoe")], ["mola", "loramoe"])
    assert [c["title"] for c in charts][-2:] == ["Expert load of mola", "Expert load of loramoe"]
    assert len(charts) == 5


def test_the_map_names_places_briefly_and_thins_long_lists() -> None:
    text = load_chart({f"model.layers.{i}.mlp.up_proj": [0.25, 0.75] for i in range(100)})
    assert "model.layers" not in text
    rects = re.findall(r'aria-label="expert: \d+; site: [^"]*"', text) or re.findall(
        r"<path aria-label", text
    )
    assert len(rects) <= 2 * 24


def test_the_report_holds_them(tmp_path: Path) -> None:
    page = write_report(tmp_path / "r.html", [{"method": "mola", "accuracy": 0.5}], [run()]).read_text()
    for title in ("Router entropy", "Balance loss", "Expert load"):
        assert f"<h2>{title}</h2>" in page
