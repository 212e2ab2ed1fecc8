"""From measured speeds to a plan that keeps the budget, and to the conductor that carries it out."""

from __future__ import annotations

import shutil
from typing import Any

from tunewise.core.errors import UserError
from tunewise.prepare import Data
from tunewise.study.budget import Clock
from tunewise.study.conduct import Conductor
from tunewise.study.halving import Arm, Plan
from tunewise.study.judge.paired import FIXED
from tunewise.study.portfolio import BASELINES, UNKNOWN_PRIOR, prior
from tunewise.study.schedule import Fixed, Schedule
from tunewise.study.setup import Setup
from tunewise.study.store import Store

__all__ = ["KEPT", "conductor_of", "halving_plan"]

KEPT = (FIXED, "full")
"""Trained to the end whatever their rank: what everyone uses, and what everyone compares with."""


def halving_plan(setup: Setup, rows: Data, clock: Clock, seeds: int, seed: int) -> Schedule:
    """Successive halving over the methods that ran, at the speeds that were measured."""
    speeds = setup.speeds()
    valid = len(rows.splits.valid)
    arms = []
    for name, s in speeds.items():
        known = (prior(setup.recipe(name)) or UNKNOWN_PRIOR) if s["steps"] else ()
        look = s["row"] * valid
        over = s["solve"] + look + setup.LEAST if not s["steps"] else 2 * look + setup.LEAST
        arms.append(Arm(name, known, s["step"], over, keep=name in KEPT, seeded=name == FIXED))
    waiting = setup.waiting(BASELINES.get(rows.task.name, ()))
    trained = sum(1 for arm in arms if arm.prior)
    finalists = min(trained, 8)
    further = -(-finalists // 3) * (seeds - 1)
    each = [setup.measuring(name, rows) for name in speeds]
    mean = sum(each) / len(each)
    total = mean * (len(arms) - trained + finalists + further + 1) + sum(waiting.values())
    after = store_once(setup.store, "reserve", total / setup.machine.workers + setup.REPORT)
    before = store_once(setup.store, "setup_seconds", clock.spent)
    plan = Plan(
        arms,
        budget=clock.budget,
        rows=len(rows.splits.train),
        batch_size=setup.settings["batch_size"],
        seeds=seeds,
        seed=seed,
        workers=setup.machine.workers,
        reserve=before + after,
    )
    if not any(t.cost for t in setup.store.trials()):
        _check_disk(setup, plan)
    return plan


def _check_disk(setup: Setup, plan: Plan) -> None:
    """Raises `UserError` where checkpoints have no room: weights and two moments of every configuration and seed."""
    numbers = [setup.known[arm.method]["trainable"] for arm in plan.trained]
    needed = 12 * (plan.n * sum(numbers) + plan.seeds * plan.finished * max(numbers, default=0)) + 2**26
    free = shutil.disk_usage(setup.store.folder).free
    if free < needed:
        raise UserError(
            f"The disk of {setup.store.folder} has {free / 2**30:,.1f} GiB left and the checkpoints of this study may "
            f"take {needed / 2**30:,.1f} GiB: free some space, choose another --out, or compare fewer methods."
        )


def store_once(store: Store, key: str, value: Any) -> Any:
    """What the study decided when it first came here; a study that goes on keeps to it."""
    if store.get(key) is None:
        store.set(key, value)
    return store.get(key)


def conductor_of(setup: Setup, schedule: Schedule, clock: Clock, rows: Data) -> Conductor:
    """Who carries the schedule out. The learning rate rises over 6 % of a run, within a third of the first rung."""
    settings = setup.settings
    epoch = -(-len(rows.splits.train) // settings["batch_size"])
    warm = 0
    if isinstance(schedule, Plan):
        first = schedule.lengths(schedule.length)[0]
        warm = max(1, min(round(0.06 * schedule.length), first // 3))
    elif isinstance(schedule, Fixed):
        warm = max(1, round(0.06 * min((t.steps for t in schedule.trials if t.steps), default=1)))
    return Conductor(
        setup.store,
        setup.pool,
        clock,
        schedule,
        workers=setup.machine.workers,
        batch=min(settings.get("micro_batch") or settings["batch_size"], settings["batch_size"]),
        reserve=setup.store.get("reserve", 0.0),
        higher_is_better=rows.task.higher_is_better,
        warmup_steps=store_once(setup.store, "warmup_steps", warm),
        steps_per_epoch=epoch,
        speeds=setup.known,
        measuring=lambda name: setup.measuring(name, rows),
    )
