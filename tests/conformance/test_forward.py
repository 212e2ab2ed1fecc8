"""Every method: start, gradients, counts, calls, linearity, precision, padding, checkpointing, compile."""

from __future__ import annotations

import pytest

from tunewise.core.delta import forms

from . import forward_checks as checks
from .support import Case, each


@each(when=lambda c: c.declares_identity)
def test_step_zero_is_the_base(case: Case) -> None:
    checks.check_identity(case)


@each()
def test_declared_tensors_alone_receive_gradients(case: Case) -> None:
    checks.check_gradients(case)


@each()
def test_trainable_count_equals_formula(case: Case) -> None:
    checks.check_count(case)


@each()
def test_no_dead_site(case: Case) -> None:
    checks.check_calls(case)


@each(when=lambda c: any(p.linear and set(forms(p)) & {"input", "output"} for p in c.parts["delta"]))  # type: ignore[attr-defined]
def test_declared_linear_is_affine(case: Case) -> None:
    checks.check_linear(case)


@each()
def test_bfloat16_close_to_float32(case: Case) -> None:
    checks.check_bfloat16(case)


@each()
def test_padding_side_as_the_base(case: Case) -> None:
    checks.check_padding(case)


@each()
def test_gradient_checkpointing_equals_eager(case: Case) -> None:
    checks.check_checkpointing(case)


@pytest.mark.slow
@each()
def test_compiled_equals_eager(case: Case) -> None:
    checks.check_compiles(case)
