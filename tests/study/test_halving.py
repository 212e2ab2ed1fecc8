"""Successive halving in simulated worlds: budgets, fairness, failures, and going on after a kill."""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from tunewise.core.errors import UserError
from tunewise.study.budget import parse_time
from tunewise.study.halving import Arm, Finished, Plan, Trial

Fails = Callable[[Trial], bool]


class World:
    """Methods with a limit of quality, a pace, a best rate and a speed, all drawn from a seed."""

    def __init__(self, seed: int, count: int, noise: float = 0.004, misjudged: float = 0.3) -> None:
        draw = random.Random(seed)
        self.seed, self.noise = seed, noise
        self.facts, self.arms = {}, []
        for i in range(count):
            name, step, overhead = f"m{i}", draw.uniform(0.05, 0.4), draw.uniform(0.1, 2.0)
            self.facts[name] = (
                draw.uniform(0.7, 0.95),
                draw.uniform(20, 80),
                draw.uniform(-0.6, 0.6),
                step,
                overhead,
            )
            wrong = math.exp(draw.uniform(-misjudged, misjudged))
            self.arms.append(Arm(name, (1e-4, 1e-3, 1e-2), step * wrong, overhead * wrong, keep=i == 0))
        self.arms.append(Arm("solved", (), 0.0, 3.0))

    def quality(self, method: str, lr: float, steps: int) -> float:
        best, pace, place, _, _ = self.facts[method]
        return best * (1 - math.exp(-steps / pace)) - 0.1 * (math.log10(lr / 1e-3) - place) ** 2

    def run(self, trial: Trial) -> Finished:
        draw = random.Random(f"{self.seed} {trial.key}")
        if trial.lr is None:
            return Finished(trial.key, 0.6, 3.3, 0.0)
        _, _, _, step, overhead = self.facts[trial.method]
        training = step * (trial.steps - trial.start) * draw.gauss(1, 0.03)
        score = self.quality(trial.method, trial.lr, trial.steps) + draw.gauss(0, self.noise)
        return Finished(trial.key, score, training + overhead * draw.gauss(1, 0.03), training)


def play(plan: Plan, world: World, rows: list[Finished] | None = None, fails: Fails | None = None):
    """The study with one worker; gives its trials and rows."""
    rows, trials = list(rows or []), []
    while pending := plan.next_trials(rows):
        trial = pending[0]
        row = world.run(trial)
        if fails and fails(trial):
            row = Finished(trial.key, None, row.seconds / 3, row.training / 3, "the loss is NaN")
        trials.append(trial)
        rows.append(row)
    return trials, rows


def plan_of(world: World, budget: float, **options) -> Plan:
    return Plan(world.arms, budget, **{"rows": 1600, "most_epochs": 1000.0, **options})


@pytest.mark.parametrize("seed", range(200))
def test_the_budget_is_kept(seed: int) -> None:
    draw = random.Random(seed)
    count = draw.randint(2, 12)
    world = World(seed, count)
    budget = count * draw.uniform(60, 400)
    plan = plan_of(world, budget, seeds=draw.randint(1, 4), reserve=0.02 * budget)
    trials, rows = play(plan, world)
    spent = sum(row.seconds for row in rows) + plan.reserve
    assert 0.85 * budget <= spent <= 1.05 * budget
    assert plan.outcome(rows).done
    assert len({t.key for t in trials}) == len(trials)


def test_the_best_method_is_found() -> None:
    lost = []
    for seed in range(15):
        world = World(seed, 10)
        plan = plan_of(world, 3000.0)
        _, rows = play(plan, world)
        found = plan.outcome(rows).standings[0]
        assert found.lr is not None
        best = max(
            world.quality(m, 10**e, found.steps) for m in world.facts for e in (-3.8, -3.5, -3, -2.5, -2.2)
        )
        lost.append(best - world.quality(found.method, found.lr, found.steps))
    assert sum(lost) / len(lost) < 0.01 and max(lost) < 0.03


@pytest.mark.parametrize("seed", range(4))
def test_a_killed_study_goes_on_as_if_it_had_not_been(seed: int) -> None:
    world = World(seed, 5)
    plan = plan_of(world, 800.0)
    trials, rows = play(plan, world, fails=lambda t: "m1 lr=0.001" in t.key)
    shuffled = random.Random(seed)
    for cut in range(len(rows) + 1):
        known = rows[:cut]
        shuffled.shuffle(known)
        pending = plan_of(world, 800.0).next_trials(known)
        assert pending[:1] == trials[cut : cut + 1]
    again = play(plan, world, rows[: len(rows) // 2], fails=lambda t: "m1 lr=0.001" in t.key)
    assert again[1] == rows


def test_every_method_gets_the_same() -> None:
    world = World(3, 9)
    plan = plan_of(world, 2000.0, configurations=5)
    trials, rows = play(plan, world)
    first = [t for t in trials if t.rung == 0 and t.lr is not None]
    assert set(Counter(t.method for t in first).values()) == {5}
    last = len(plan.sizes) - 1
    for rung in range(last):
        own = [t for t in trials if t.rung == rung and t.lr is not None]
        assert {t.method for t in own} == set(world.facts)
        assert len({t.steps for t in own}) == 1
    final = [t for t in trials if t.rung == last and t.seed == 0]
    assert len(final) == 8 and "m0" in {t.method for t in final}
    by_key = {t.key: t for t in trials}
    for trial in trials:
        assert trial.start == (by_key[trial.after].steps if trial.after else 0)
    repeated = [t for t in trials if t.seed > 0]
    assert repeated and {(t.start, t.steps) for t in repeated} == {(0, final[0].steps)}
    best = plan.outcome(rows).standings[:3]
    assert sum(set(s.scores) == {0, 1, 2} for s in best) >= 2


def test_the_method_that_others_are_tested_against_has_its_seeds_whatever_its_rank() -> None:
    for name in ("m1", "m4"):
        seeds = {}
        for seeded in (False, True):
            world = World(3, 9)
            world.arms = [replace(arm, keep=arm.method == name) for arm in world.arms]
            world.arms = [replace(arm, seeded=seeded and arm.method == name) for arm in world.arms]
            world.facts[name] = (0.5, *world.facts[name][1:])  # the worst of all
            plan = Plan(world.arms, budget=900.0, rows=3200, seeds=2)
            trials, _ = play(plan, world)
            first = [t.method for t in trials if t.rung == plan.last and t.seed == 1][:4]
            seeds[seeded] = name in first
        assert seeds == {False: False, True: True}


def test_a_failed_configuration_is_out_and_the_next_one_takes_its_place() -> None:
    world = World(5, 4)
    plan = plan_of(world, 900.0)
    undisturbed, _ = play(plan, world)
    victim = next(t for t in undisturbed if t.rung == 1 and t.method == "m2")
    trials, rows = play(plan, world, fails=lambda t: t.key == victim.key)
    second = [t for t in trials if t.rung == 1 and t.method == "m2"]
    assert len(second) >= 2 and second[-1].lr != victim.lr
    assert not any(t.rung > 1 and t.method == "m2" and t.lr == victim.lr for t in trials)
    assert not plan.outcome(rows).failed


def test_a_method_that_always_fails_is_reported() -> None:
    world = World(6, 4)
    plan = plan_of(world, 900.0)
    trials, rows = play(plan, world, fails=lambda t: t.method in ("m0", "solved"))
    outcome = plan.outcome(rows)
    assert set(outcome.failed) == {"m0", "solved"} and set(outcome.failed["m0"]) == {"the loss is NaN"}
    assert {s.method for s in outcome.standings} == {"m1", "m2", "m3"}
    assert max(t.rung for t in trials if t.method == "m0") == 0
    spent = sum(row.seconds for row in rows)
    assert 0.85 * 900 <= spent <= 1.05 * 900


def test_everything_may_fail() -> None:
    world = World(7, 3)
    plan = plan_of(world, 900.0)
    _, rows = play(plan, world, fails=lambda t: True)
    outcome = plan.outcome(rows)
    assert outcome.done and not outcome.standings and len(outcome.failed) == 4


def test_a_score_that_is_no_number_is_a_failure() -> None:
    assert Finished("a", math.nan, 1.0, 1.0).failed and not Finished("a", 0.0, 1.0, 1.0).failed


@pytest.mark.parametrize("factor", [0.3, 3.0])
def test_speeds_that_were_misjudged_are_learnt(factor: float) -> None:
    world = World(8, 8, misjudged=0.0)
    wrong = [Arm(a.method, a.prior, a.step * factor, a.overhead * factor, a.keep) for a in world.arms]
    plan = Plan(wrong, 6000.0, rows=1600, most_epochs=1000.0)
    trials, rows = play(plan, world)
    spent = sum(row.seconds for row in rows)
    assert 0.85 * 6000 <= spent <= 1.05 * 6000
    assert {t.method for t in trials if t.rung == 0} == {a.method for a in world.arms}
    assert any(s.finished and s.method != "solved" for s in plan.outcome(rows).standings)


def test_two_workers() -> None:
    world = World(9, 8)
    plan = plan_of(world, 1500.0, workers=2)
    rows: list[Finished] = []
    now, running = 0.0, []
    while True:
        busy = {trial.key for _, _, trial in running}
        for trial in plan.next_trials(rows):
            if len(running) < 2 and trial.key not in busy:
                heapq.heappush(running, (now + world.run(trial).seconds, trial.key, trial))
                busy.add(trial.key)
        if not running:
            break
        now, _, trial = heapq.heappop(running)
        rows.append(world.run(trial))
    assert 0.85 * 1500 <= now <= 1.05 * 1500
    assert plan.outcome(rows).spent == pytest.approx(now, rel=1e-6)


def test_limits_keep_the_budget() -> None:
    world = World(10, 3)
    plan = plan_of(world, 400.0)
    rows: list[Finished] = []
    while pending := plan.next_trials(rows):
        spent = sum(row.seconds for row in rows)
        assert spent + pending[0].limit <= 1.05 * 400 + 1e-6
        rows.append(world.run(pending[0]))


def test_a_small_need_leaves_budget_over() -> None:
    world = World(11, 3)
    plan = plan_of(world, 100_000.0, most_epochs=4.0)
    _, rows = play(plan, world)
    outcome = plan.outcome(rows)
    assert plan.n == 9 and plan.length == 200 and outcome.done and not outcome.left_out
    assert all(set(s.scores) == {0, 1, 2} for s in outcome.standings if s.lr is not None)
    assert "larger than needed" in plan.describe()


def test_too_little_time_is_refused_with_what_would_do() -> None:
    world = World(12, 10)
    with pytest.raises(UserError, match="less than a tenth of an epoch") as refused:
        plan_of(world, 200.0, rows=16_000)
    sentence = str(refused.value)
    assert "fewer methods" in sentence and "m0" in sentence
    enough = sentence.split("--budget ")[1].split(",")[0].rstrip(".")
    plan_of(world, parse_time(enough), rows=16_000)
    fewer = sentence.split("fewer methods: ")[1].rstrip(".").split(", ")
    Plan([a for a in world.arms if a.method in fewer], 200.0, rows=16_000)
    with pytest.raises(UserError, match="less than a tenth"):
        plan_of(world, 0.5)


def test_solved_methods_alone_need_no_steps() -> None:
    plan = Plan([Arm("linear_probe", (), 0.0, 5.0)], 60.0, rows=100)
    (trial,) = plan.next_trials([])
    assert trial.lr is None and trial.steps == 0
    rows = [Finished(trial.key, 0.9, 4.0, 0.0)]
    assert plan.next_trials(rows) == [] and plan.outcome(rows).standings[0].finished
    assert "solved once" in plan.describe()


def test_described() -> None:
    world = World(13, 10)
    world.arms = [replace(arm, seeded=arm.method == "m4") for arm in world.arms]
    text = plan_of(world, 2000.0, configurations=3).describe()
    assert "10 methods, 3 learning rates each" in text and "3 seeds for the best 3 and m4" in text
    assert all(f"  {arm.method}" in text for arm in world.arms)


@pytest.mark.parametrize("option", ["rows", "seeds", "eta", "workers", "configurations", "most_epochs"])
def test_bad_options(option: str) -> None:
    with pytest.raises(UserError, match=option):
        plan_of(World(0, 2), 100.0, **{option: 0})


def test_bad_methods() -> None:
    with pytest.raises(UserError, match="no method"):
        Plan([], 10.0, rows=5)
    with pytest.raises(UserError, match="given twice"):
        Plan([Arm("a", (), 0.0), Arm("a", (), 0.0)], 10.0, rows=5)
