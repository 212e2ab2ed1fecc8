"""Every method: merge, materialize, save, switch, copy, pickle, detach, base checkpoints, quantized bases."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from . import keeping_checks as checks
from .support import Case, each


@each()
def test_merge_equals_unmerged(case: Case) -> None:
    checks.check_merge(case)


@each(when=lambda c: c.mergeable)
def test_materialize_equals_pushed_identity(case: Case) -> None:
    checks.check_materialize(case)


@each()
def test_save_restore_equals(case: Case, tmp_path: Path) -> None:
    checks.check_save_restore(case, tmp_path)


@each()
def test_two_adaptations_apart(case: Case) -> None:
    checks.check_two_adaptations(case)


@each()
def test_deepcopy_independent(case: Case) -> None:
    checks.check_deepcopy(case)


@each()
def test_pickle_equals(case: Case) -> None:
    checks.check_pickle(case)


@each()
def test_detach_restores(case: Case) -> None:
    checks.check_detach(case)


@each()
def test_base_checkpoint_loads_and_saves(case: Case, tmp_path: Path) -> None:
    checks.check_base_checkpoint(case, tmp_path)


@each("roberta", when=lambda c: bool(c.parts["delta"]))
def test_quantized_base_works_or_is_refused(case: Case) -> None:
    checks.check_quantized(case, real=False)


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
@each("roberta", when=lambda c: bool(c.parts["delta"]))
def test_torchao_base_works_or_is_refused(case: Case) -> None:
    checks.check_quantized(case, real=True)
