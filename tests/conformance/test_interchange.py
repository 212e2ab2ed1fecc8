"""Every method: as a PEFT checkpoint, and as plain LoRA; both are loaded by PEFT itself."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from . import interchange_checks as checks
from .support import Case, each

pytestmark = pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")


@each()
def test_peft_answers_the_same_or_is_refused(case: Case, tmp_path: Path) -> None:
    checks.check_peft(case, tmp_path)


@each()
def test_plain_lora_is_as_exact_as_it_says(case: Case, tmp_path: Path) -> None:
    checks.check_export_lora(case, tmp_path)
