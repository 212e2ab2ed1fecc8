"""What `--prefer` takes and what it chooses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tunewise.core.errors import UserError
from tunewise.study.judge.pareto import COSTS, dominates, quality
from tunewise.study.judge.prefer import WORDS, Term, choose, parse_prefer

FULL = {
    "method": "full",
    "accuracy": 0.850,
    "accuracy_low": 0.83,
    "accuracy_high": 0.87,
    "peak_memory_mb": 900.0,
    "seconds": 90.0,
    "size_mb": 80.0,
}
LORA = {"method": "lora", "accuracy": 0.845, "peak_memory_mb": 400.0, "seconds": 60.0, "size_mb": 1.0}
BIAS = {"method": "bias", "accuracy": 0.840, "peak_memory_mb": 300.0, "seconds": 50.0, "size_mb": 0.5}
PROBE = {"method": "probe", "accuracy": 0.700, "peak_memory_mb": 100.0, "seconds": 5.0, "size_mb": 0.1}
ROWS = [PROBE, LORA, FULL, BIAS]


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("quality", (Term("quality"),)),
        (" Size ", (Term("size"),)),
        ("quality within 1%, then memory", (Term("quality", 1.0, "%"), Term("memory"))),
        ("quality within 1 percent then memory", (Term("quality", 1.0, "%"), Term("memory"))),
        (
            "quality within 0.5 points, then time, then size",
            (Term("quality", 0.5, "points"), Term("time"), Term("size")),
        ),
        ("quality within 1 point,memory", (Term("quality", 1.0, "points"), Term("memory"))),
        ("quality within the noise, then size", (Term("quality", unit="noise"), Term("size"))),
        ("memory within 10%, then quality", (Term("memory", 10.0, "%"), Term("quality"))),
    ],
)
def test_parsing(text: str, terms: tuple[Term, ...]) -> None:
    assert parse_prefer(text).terms == terms


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("qualty", 'by "qualty"; did you mean "quality"'),
        ("quality within 1%, then memroy", 'did you mean "memory"'),
        ("bananas", "known: forgetting, inference, memory"),
        ("", "an empty place"),
        ("quality within 1%, then", 'by "then"|empty place'),
        ("quality,, memory", "an empty place"),
        ("quality within 1%", 'add for example ", then memory"'),
        ("memory within 1%", 'add for example ", then quality"'),
        ("quality within 1, then size", '"within 1" is not understood'),
        ("quality within -1%, then size", "is not understood"),
        ("quality about 1%, then size", '"about 1%" after "quality"'),
        ("memory within 5 points, then size", 'write "memory within 5%"'),
        ("memory within the noise, then size", "Only quality has an interval"),
        ("size, then quality, then size", '"size" comes twice'),
    ],
)
def test_what_is_not_understood_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parse_prefer(text)


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("quality", "full"),
        ("size", "probe"),
        ("memory", "probe"),
        ("quality within 0.6%, then memory", "lora"),
        ("quality within 1%, then memory", "lora"),
        ("quality within 1 point, then memory", "bias"),
        ("quality within 0.4 points, then memory", "full"),
        ("quality within 0.5 points, then time, then size", "lora"),
        ("quality within the noise, then size", "bias"),
        ("memory within 300%, then quality", "lora"),
    ],
)
def test_choosing(text: str, method: str) -> None:
    assert choose(ROWS, text).row["method"] == method


def test_the_sentence_says_why() -> None:
    assert choose(ROWS, "quality").sentence == "full has the highest accuracy: 0.850."
    assert choose(ROWS, "quality within 1%, then memory").sentence == (
        "lora has the lowest peak memory of those within 1% of the best accuracy (2 of 4 methods): 419 MB; "
        "its accuracy is 0.845, the best is 0.850 (full)."
    )
    assert "of those that cannot be told apart from the best accuracy (3 of 4 methods)" in (
        choose(ROWS, "quality within the noise, then size").sentence
    )
    assert choose([FULL], "size").sentence == (
        "full has the lowest size on disk: 83.9 MB; its accuracy is the best, 0.850."
    )


def test_a_paired_test_decides_what_noise_is() -> None:
    told = choose(ROWS, "quality within the noise, then size", same=lambda row, best: row["method"] == "lora")
    assert told.row is LORA


def test_a_lead_that_rests_on_one_seed_yields_to_what_it_cannot_be_told_apart_from() -> None:
    def seeds(row: dict[str, Any], count: int) -> dict[str, Any]:
        return {**row, "seeds": count, "lr": 1e-3}

    full, lora, bias = seeds(FULL, 1), seeds(LORA, 2), seeds(BIAS, 3)
    found = choose([full, lora, bias], "quality")
    assert found.row is lora
    assert found.sentence == (
        "lora has the highest accuracy of those whose lead does not rest on one seed: 0.845; full has 0.850."
    )
    assert choose([full, lora, bias], "quality within 1%, then memory").row is bias
    assert choose([full, lora, bias], "size within 10%, then quality").row is bias
    assert choose([full, lora, bias], "memory").row is bias
    assert (
        choose([full, lora, bias], "quality", same=lambda row, best: False).row is full
    )  # told apart: no luck
    assert choose([seeds(FULL, 2), seeds(LORA, 3)], "quality").row["method"] == "full"
    assert choose([full, seeds(LORA, 1)], "quality").row is full
    assert choose([{**full, "lr": None}, lora], "quality").row["method"] == "full"  # no seed changes it


def test_lower_can_be_better() -> None:
    rows = [
        {"method": "a", "rmse": 2.00, "seconds": 9.0},
        {"method": "b", "rmse": 2.01, "seconds": 1.0},
        {"method": "c", "rmse": 2.50, "seconds": 0.5},
    ]
    assert choose(rows, "quality", "rmse", False).row["method"] == "a"
    assert choose(rows, "quality within 1%, then time", "rmse", False).row["method"] == "b"
    with pytest.raises(UserError, match="between 0 and 1, and rmse is 2.000"):
        choose(rows, "quality within 1 point, then time", "rmse", False)


def test_rows_that_lack_a_value_are_said() -> None:
    rows = [*ROWS, {"method": "crashed", "accuracy": float("nan")}, {"method": "tfidf", "accuracy": 0.9}]
    found = choose(rows, "quality within 1%, then memory")
    assert found.row is LORA
    assert found.notes == [
        "Not considered, because their accuracy is not known: crashed.",
        "Not considered, because their peak memory is not known: tfidf.",
    ]
    with pytest.raises(UserError, match="No row has a measured forgetting"):
        choose(rows, "forgetting")
    with pytest.raises(UserError, match="No row has a measured accuracy"):
        choose([], "quality")


@pytest.mark.parametrize(
    "text",
    [*WORDS, "quality within 30%, then memory", "time within 60%, then quality within 5 points, then size"],
)
def test_the_choice_is_on_the_front(text: str) -> None:
    make, goals = np.random.default_rng(0), [quality("accuracy"), *COSTS]
    for _ in range(150):
        rows: list[dict[str, Any]] = [
            {"method": f"m{i}", **{k.key: float(make.integers(0, 4)) / 4 for k in goals}} for i in range(8)
        ]
        chosen = choose(rows, text)
        assert not chosen.notes and not any(dominates(other, chosen.row, goals) for other in rows)
        assert choose(rows, text).sentence == chosen.sentence
