"""Every method on real peptides: loss falls, resume, events, accumulation, losses of weight 0."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunewise.core.method import method_names

from . import training_checks as checks
from .support import BASES, IMAGES, Case, each


@each("roberta")
def test_loss_falls_on_real_data(case: Case) -> None:
    checks.check_loss_falls(case)


@each("roberta", when=checks.in_steps)
def test_resume_equals_uninterrupted(case: Case, tmp_path: Path) -> None:
    checks.check_resume(case, tmp_path)


@each("roberta", when=checks.in_steps)
@pytest.mark.parametrize("accumulation", [1, 4])
def test_lifecycle_order(case: Case, accumulation: int) -> None:
    checks.check_lifecycle(case, accumulation)


@each("roberta", when=lambda c: checks.in_steps(c) and "optimizer" not in c.parts.essential)
def test_accumulation_equals_one_batch(case: Case) -> None:
    checks.check_accumulation(case)


@each("roberta", when=checks.in_steps)
def test_zero_weight_loss_changes_nothing(case: Case) -> None:
    checks.check_zero_weight(case)


@each("roberta", when=lambda c: not checks.in_steps(c))
def test_own_loop_is_deterministic(case: Case) -> None:
    checks.check_loop_is_deterministic(case)


@pytest.mark.parametrize("method", method_names())
def test_some_base_accepts(method: str) -> None:
    from tunewise.core.method import get_method

    assert any(checks.accepted(Case(method, get_method(method), base)) for base in (*BASES, IMAGES))
