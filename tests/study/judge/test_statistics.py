"""Intervals that cover what they promise, paired tests against exact answers, and the sentences."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from tunewise.core.errors import UserError
from tunewise.study.judge.sentences import verdict
from tunewise.study.judge.statistics import (
    Comparison,
    Difference,
    RowMetric,
    best_of,
    compare_to,
    holm,
    interval,
    mcnemar,
    paired_difference,
    rows_needed,
)
from tunewise.task.metrics import bootstrap, confusion, confusion_scores, wilson

SIMULATIONS = 200


class World:
    """Scores 0.5 + row + seed + both, as every method on every test set has them."""

    def __init__(self, rows: float, seeds: float, both: float, n: int = 120) -> None:
        self.sizes, self.n = (rows, seeds, both), n

    def methods(self, number: int, seeds: int, make: np.random.Generator) -> list[np.ndarray]:
        row, seed, both = self.sizes
        shared = 0.5 + make.normal(0, row, self.n)
        return [
            shared + make.normal(0, seed, (seeds, 1)) + make.normal(0, both, (seeds, self.n))
            for _ in range(number)
        ]


WORLDS = [
    (1, World(0.3, 0.0, 0.3)),
    (3, World(0.3, 0.0, 0.3)),
    (3, World(0.3, 0.02, 0.3)),
    (3, World(0.3, 0.1, 0.3)),
    (5, World(0.05, 0.1, 0.05)),
]


@pytest.mark.parametrize(("seeds", "world"), WORLDS)
def test_intervals_cover(seeds: int, world: World) -> None:
    make, score, gap = np.random.default_rng(1), 0, 0
    for _ in range(SIMULATIONS):
        first, second = world.methods(2, seeds, make)
        found = interval(first, draws=300, generator=make)
        score += found.low <= 0.5 <= found.high
        difference = paired_difference(first, second, draws=300, generator=make)
        gap += difference.low <= 0 <= difference.high
    assert 0.90 <= score / SIMULATIONS <= 0.99
    assert 0.90 <= gap / SIMULATIONS <= 0.99


def test_intervals_of_accuracies_cover() -> None:
    make, hits = np.random.default_rng(2), 0
    for _ in range(SIMULATIONS):
        found = interval(make.random((1, 80)) < 0.9, draws=2, generator=make)
        hits += found.low <= 0.9 <= found.high
    assert 0.90 <= hits / SIMULATIONS <= 0.99


def test_one_seed_of_right_or_wrong_is_wilson_as_in_a_run() -> None:
    right = np.array([[1.0] * 83 + [0.0] * 17])
    found = interval(right)
    assert (found.low, found.high) == pytest.approx(wilson(83, 100))
    assert (found.value, found.rows, found.seeds) == (0.83, 100, 1)


def test_all_right_is_not_certain() -> None:
    found = interval(np.ones((3, 50)))
    assert found.low < 0.95 and found.high == 1.0


def test_seeds_that_differ_widen_the_interval() -> None:
    rows = np.random.default_rng(0).normal(0.5, 0.1, 400)
    equal, unlike = np.stack([rows] * 3), np.stack([rows - 0.1, rows, rows + 0.1])
    narrow, wide = interval(equal), interval(unlike)
    assert wide.high - wide.low > 5 * (narrow.high - narrow.low)
    # Exactly: the mean of three values 0.1 apart is known to +- t_2 * 0.1 / sqrt(3).
    assert wide.high - wide.value == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=0.15)


def test_pairing_removes_the_difficulty_of_rows() -> None:
    make = np.random.default_rng(0)
    difficulty = make.normal(0, 1, 300)
    first = (difficulty + 0.05 + make.normal(0, 0.05, (3, 300))).clip(-5, 5)
    second = difficulty + make.normal(0, 0.05, (3, 300))
    found = paired_difference(first, second)
    assert found.verdict == "better" and found.high - found.low < 0.1
    alone = interval(first)
    assert alone.high - alone.low > 0.15


def test_the_same_data_give_the_same_numbers() -> None:
    table = {"a": np.random.default_rng(0).random((3, 50)), "b": np.random.default_rng(1).random((2, 50))}
    assert compare_to("a", table) == compare_to("a", table)
    other = compare_to("a", table, generator=np.random.default_rng(7))
    assert other["b"].low != compare_to("a", table)["b"].low
    assert other["b"].low == pytest.approx(compare_to("a", table)["b"].low, abs=0.1)


def test_a_metric_on_row_numbers_equals_the_matrix() -> None:
    scores = np.random.default_rng(0).random((3, 60))
    by_call = RowMetric(lambda rows: scores[:, rows].mean(axis=1), 60)
    one, other = interval(by_call), interval(scores)
    assert (one.low, one.high) == pytest.approx((other.low, other.high))
    assert paired_difference(by_call, scores).p > 0.9


def test_macro_f1() -> None:
    make = np.random.default_rng(0)
    truth = make.integers(0, 3, 200)
    predicted = [np.where(make.random(200) < 0.8, truth, make.integers(0, 3, 200)) for _ in range(3)]

    def f1(rows: np.ndarray) -> list[float]:
        return [confusion_scores(confusion(truth[rows], p[rows], 3))["macro_f1"] for p in predicted]

    found = interval(RowMetric(f1, 200), draws=400)
    low, high = bootstrap(200, lambda rows: f1(rows)[0], 400)
    assert found.value == pytest.approx(np.mean(f1(np.arange(200))))
    assert found.low < found.value < found.high
    assert 0.3 < (found.high - found.low) / (high - low) < 2


def test_resamples_without_a_score_are_counted() -> None:
    scores = np.array([0.0] * 3 + [1.0] * 27)

    def needs_a_zero(rows: np.ndarray) -> list[float]:
        return [float(scores[rows].mean()) if (scores[rows] == 0).any() else math.nan]

    found = interval(RowMetric(needs_a_zero, 30), draws=1000)
    assert 900 < found.draws < 1000 and math.isfinite(found.low)
    with pytest.raises(UserError, match="not finite for most resamples"):
        interval(RowMetric(lambda rows: [1.0 if len(set(rows)) == 30 else math.nan], 30))


def exact_mcnemar(b: int, c: int) -> float:
    outcomes = itertools.product((0, 1), repeat=b + c)
    return sum(abs(sum(o) - (b + c) / 2) >= abs(b - (b + c) / 2) for o in outcomes) / 2 ** (b + c)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (5, 0), (6, 2), (3, 3), (2, 9)])
def test_mcnemar_by_enumeration(b: int, c: int) -> None:
    first = [1.0] * b + [0.0] * c + [1.0, 0.0]
    second = [0.0] * b + [1.0] * c + [1.0, 0.0]
    assert mcnemar(first, second) == pytest.approx(exact_mcnemar(b, c))
    found = paired_difference([first], [second])
    assert found.test == "exact McNemar" and found.p == mcnemar(first, second)


def test_mcnemar_of_many_rows_and_of_no_answers() -> None:
    first = np.r_[np.ones(3000), np.zeros(2800)]
    assert mcnemar(first, 1 - first) == pytest.approx(0.0089, abs=2e-4)
    with pytest.raises(UserError, match="right"):
        mcnemar([0.5, 1.0], [1.0, 0.0])


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]


def test_equal_methods_are_seldom_told_apart() -> None:
    """Five methods without a difference: one of four is called unlike in at most 5 % of studies, and noise."""
    make, wrong = np.random.default_rng(3), 0
    for _ in range(100):
        table = dict(zip("abcde", World(0.3, 0.02, 0.2).methods(5, 3, make), strict=True))
        found = compare_to("a", table, draws=400, generator=make)
        wrong += any(d.verdict != "not told apart" for d in found.differences)
    assert wrong <= 10


def test_many_methods_can_still_be_told_apart() -> None:
    make = np.random.default_rng(0)
    table = {f"m{i}": make.normal(0.5 + (i == 0), 0.1, (1, 40)) for i in range(100)}
    assert all(d.verdict == "worse" for d in compare_to("m0", table).differences)


def seeded(make: np.random.Generator, seeds: list[int], sizes: list[float], n: int) -> dict[str, np.ndarray]:
    """Equal methods on shared rows, of which each has its number of seeds and size of their effect."""
    shared = 0.9 + make.normal(0, 0.27, n)
    return {
        f"m{i}": shared + make.normal(0, size, (count, 1)) + make.normal(0, 0.14, (count, n))
        for i, (count, size) in enumerate(zip(seeds, sizes, strict=True))
    }


@pytest.mark.parametrize(
    ("seeds", "sizes"),
    [([3] * 8, [0.02] * 8), ([1, 2, 2, 3, 1, 3, 2, 3], [0.02] * 7 + [0.3])],
)
def test_seeds_of_many_methods_cover(seeds: list[int], sizes: list[float]) -> None:
    make, value, gap, wrong, studies = np.random.default_rng(0), 0, 0, 0, 120
    for _ in range(studies):
        found = compare_to("m0", seeded(make, seeds, sizes, 200), draws=400, generator=make)
        value += sum(one.low <= 0.9 <= one.high for one in found.intervals.values())
        gap += sum(d.low <= 0 <= d.high for d in found.differences)
        wrong += any(d.verdict != "not told apart" for d in found.differences)
    assert 0.91 <= value / (8 * studies) <= 0.99
    assert 0.91 <= gap / (7 * studies) <= 0.99
    assert wrong <= 12


def test_what_no_seed_changes_has_no_noise_of_seeds() -> None:
    table = seeded(np.random.default_rng(0), [3, 3, 3, 1], [0.3] * 4, 200)
    free, fixed = compare_to("m0", table), compare_to("m0", table, fixed=["m3", "absent"])
    width = fixed.intervals["m3"].high - fixed.intervals["m3"].low
    assert free.intervals["m3"].high - free.intervals["m3"].low > 5 * width
    assert width == pytest.approx(2 * 1.96 * math.sqrt((0.27**2 + 0.14**2) / 200), rel=0.2)


def test_intervals_end_where_the_metric_does() -> None:
    table = {"a": np.full((2, 40), 0.5) + [[0.1], [-0.1]], "b": np.full((2, 40), 0.4) + [[0.1], [-0.1]]}
    wide, clipped = compare_to("a", table), compare_to("a", table, bounds=(0, 1))
    # (the difference of values within 0..1 lies within -1..1)
    assert wide.intervals["b"].low < 0 and clipped.intervals["b"].low == 0
    assert clipped["b"].low >= -1 and clipped["b"].p == wide["b"].p
    assert interval(table["b"], bounds=(0, math.inf)).low == 0


def test_lower_can_be_better() -> None:
    make = np.random.default_rng(0)
    table = {"a": make.normal(1.0, 0.1, (2, 90)), "b": make.normal(0.5, 0.1, (2, 90))}
    assert best_of(table) == "a" and best_of(table, higher_is_better=False) == "b"
    found = compare_to("b", table, higher_is_better=False)["a"]
    assert found.verdict == "worse" and found.difference > 0.4


def test_enough_rows_are_enough() -> None:
    """With the number of rows that it names, about 80 % of studies tell the two apart."""
    make, n, gap, noise = np.random.default_rng(0), 100, 0.05, 0.3
    needed = rows_needed(gap, n, 2 * noise**2 / n)
    assert needed == pytest.approx(2 * (1.96 + 0.8416) ** 2 * noise**2 / gap**2, abs=2)
    told = 0
    for _ in range(100):
        first, second = make.normal(gap, noise, (1, needed)), make.normal(0, noise, (1, needed))
        told += paired_difference(first, second, draws=300, generator=make).p < 0.05
    assert 70 <= told <= 90
    assert rows_needed(0.0, n, 0.1) is None and rows_needed(0.1, n, 0.1, seed_variance=0.1) is None
    assert paired_difference(make.normal(0.01, 1, (1, 50)), make.normal(0, 1, (1, 50))).rows_needed > 50


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ({"a": np.ones((1, 4)), "b": np.ones((1, 5))}, "a has scores of 4 rows and b of 5"),
        ({"a": np.ones((1, 1))}, "two or more"),
        ({"a": np.full((1, 4), np.nan)}, "scores of a are not all finite"),
        ({"a": np.ones(4)}, r"must be \[seeds, rows\], not \[4\]"),
        ({"a": [[1.0, 2.0], [1.0]]}, "every seed needs all rows"),
        ({"lora": np.ones((1, 4))}, 'no scores of the method "a"'),
    ],
)
def test_bad_scores_are_refused(table: dict[str, np.ndarray], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        compare_to("a", table)
    with pytest.raises(UserError, match="no scores"):
        best_of({})


def accuracies(make: np.random.Generator, **rates: float) -> dict[str, np.ndarray]:
    """Right or wrong for 3 seeds of 1,000 rows: the lower a rate, the more of the same rows are wrong."""
    ease = make.random(1000)
    return {
        name: ((ease + make.normal(0, 0.03, (3, 1000))) < rate).astype(float) for name, rate in rates.items()
    }


def sentences(baselines: list[str], **rates: float) -> list[str]:
    table = accuracies(np.random.default_rng(0), **rates)
    return verdict(compare_to(best_of(table), table), "accuracy", baselines)


def test_fine_tuning_is_worth_it() -> None:
    said = sentences(["majority", "linear_probe", "zero_shot"], majority=0.5, linear_probe=0.7, full=0.9)
    assert said[0].startswith("full has the highest accuracy: 0.90")
    assert said[0].endswith(", measured on 1,000 test rows with 3 seeds.")
    assert said[1] == "Every other method is further from it than chance explains."
    assert said[2].startswith("Fine-tuning is worth it: full is ahead of the best baseline, linear_probe (0.")
    assert len(said) == 3


def test_a_baseline_as_good_as_the_best() -> None:
    said = sentences(["majority", "linear_probe"], majority=0.5, linear_probe=0.85, full=0.8505, lora=0.8503)
    assert "These 3 methods cannot be told apart with this data: " in said[1]
    assert "Fine-tuning is not worth it with this data: " in said[2] and " within the noise." in said[2]
    assert "test rows would be needed (there are 1,000)" in said[3] or "more seeds are needed" in said[3]


def test_a_baseline_that_wins() -> None:
    said = sentences(["tfidf"], tfidf=0.9, lora=0.6, full=0.5)
    best = said[0].split(": ")[1].split(" (")[0]
    assert said[2] == (
        f"Fine-tuning is not worth it with this data: every tuned method is worse than tfidf ({best})."
    )


def test_one_seed_is_said() -> None:
    table = accuracies(np.random.default_rng(0), full=0.9, lora=0.5, tfidf=0.4)
    table = {"full": table["full"], "lora": table["lora"][:1], "tfidf": table["tfidf"][:1]}
    found = compare_to("full", table, fixed=["tfidf"])
    assert [one.noise for one in found.intervals.values()] == ["measured", "lent", "none"]
    assert verdict(found, "accuracy", ["tfidf"])[-1] == (
        "Only one seed was measured of lora: what another seed would change was taken from the other methods "
        "for its interval."
    )
    alone = compare_to("full", {**table, "full": table["full"][:1]}, fixed=["tfidf"])
    assert alone["lora"].test == "exact McNemar"
    assert verdict(alone, "accuracy", ["tfidf"])[-1] == (
        "Only one seed was measured of full, lora: what another seed would change is not in their intervals."
    )
    with pytest.raises(UserError, match="full is better than lora"):
        verdict(compare_to("lora", table), "accuracy")


def test_no_question_is_answered_that_was_not_measured() -> None:
    assert len(sentences([], full=0.9, lora=0.5)) == 2
    assert len(sentences([], full=0.9)) == 1
    assert len(sentences(["zero_shot"], full=0.9, lora=0.5)) == 2


@pytest.mark.parametrize(
    ("gap", "needed", "sentence"),
    [
        (0.0, None, "score the same"),
        (-0.01, None, "more seeds are needed"),
        (-0.01, 4321, "about 4,400 test rows would be needed"),
    ],
)
def test_how_many_rows(gap: float, needed: int | None, sentence: str) -> None:
    top = interval(np.eye(2))
    found = Difference("b", "a", gap, -0.02, 0.01, 0.5, 0.5, "not told apart", "bootstrap", needed)
    said = verdict(Comparison("a", True, 0.95, 1000, {"a": top, "b": top}, [found]), "accuracy")
    assert sentence in said[-1]
