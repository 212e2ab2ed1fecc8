"""Numbers as they stand in tables, and the sentence on top."""

from __future__ import annotations

import pytest

from tunewise.study.report.cells import amount, duration, headline, megabytes, score, size
from tunewise.study.report.charts import (
    BASELINE_SHAPES,
    PALETTE,
    SHAPES,
    cost_chart,
    curve_chart,
    looks,
    swatch,
)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (score(0.8456), "0.846"),
        (score(0.0), "0.000"),
        (score(1.5e-5), "1.5e-05"),
        (score(12345.678), "1.23e+04"),
        (amount(0), "0"),
        (amount(9_999), "9,999"),
        (amount(405_000), "405 k"),
        (amount(22_700_000), "22.7 M"),
        (amount(6.7e9), "6.7 B"),
        (duration(0.0002), "< 0.1 s"),
        (duration(4.02), "4.0 s"),
        (duration(9.97), "10 s"),
        (duration(59.7), "1 min 0 s"),
        (duration(7500), "2 h 5 min"),
        (size(920), "920 B"),
        (size(1_234_567), "1.23 MB"),
        (megabytes(1024), "1.07 GB"),
    ],
)
def test_numbers(written: str, expected: str) -> None:
    assert written == expected


def row(name: str, value: float, trainable: int, half: float = 0.01) -> dict[str, object]:
    return {"method": name, "m": value, "m_low": value - half, "m_high": value + half, "trainable": trainable}


def test_headline_names_a_cheaper_equal_one() -> None:
    rows = [row("full", 0.84, 1000), row("lora", 0.83, 10), row("probe", 0.7, 1)]
    assert headline(rows, "m") == (
        "full has the highest m: 0.840 (0.830 to 0.850). "
        "lora reaches 0.830, too close to tell the two apart, while training only 1 % as many parameters."
    )


def test_headline_stays_silent_about_worse_ones() -> None:
    assert headline([row("full", 0.84, 1000), row("probe", 0.7, 1)], "m").count(".") == 4
    assert headline([row("a", 2.0, 5), row("b", 1.0, 9)], "m", higher_is_better=False).startswith(
        "b has the lowest m"
    )


def test_many_names_stay_distinct() -> None:
    names = [f"m{i}" for i in range(len(PALETTE) * len(SHAPES))]
    baselines = [f"b{i}" for i in range(len(BASELINE_SHAPES))]
    swatches = {swatch(look) for look in looks(names, baselines).values()}
    assert len(swatches) == len(names) + len(baselines)


def test_charts_of_extreme_values() -> None:
    points = [{"name": "a", "step": s, "value": v} for s, v in ((1, 1.0), (2, float("inf")), (3, 0.5))]
    assert curve_chart(points, "loss & more", ["a"]).startswith("<svg")
    assert 'aria-label="loss &amp; more by step"' in curve_chart(points, "loss & more", ["a"])
    dots = [{"name": "a", "x": 1, "y": 0.5, "low": None, "high": None}, {"name": "b", "x": 1e9, "y": 0.6}]
    assert cost_chart(dots, "x", "y", ["a", "b"]).startswith("<svg")


def test_long_runs_are_thinned() -> None:
    points = [{"name": "a", "step": s, "value": float(s)} for s in range(5000)]
    assert len(curve_chart(points, "loss", ["a"])) < 30_000
