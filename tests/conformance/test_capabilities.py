"""The results file says what each check of each method found, whatever the order and number of processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from .capabilities import NAME, Capabilities


def report(method: str, check: str, base: str, result: str = "passed", **remarks: str) -> Any:
    """As pytest reports the call of a test."""
    longrepr = {
        "failed": "AssertionError: wrong\nassert 1 == 2",
        "skipped": ("file", 1, "Skipped: not here."),
    }
    return SimpleNamespace(
        when="call",
        failed=result == "failed",
        skipped=result == "skipped",
        longrepr=longrepr.get(result),
        user_properties=[(NAME, [method, check, base]), *remarks.items()],
    )


REPORTS = [
    report("lora", "merge", "roberta"),
    report("lora", "merge", "llama", "skipped"),
    report("lora", "lifecycle", "roberta", "failed"),
    report("lora", "lifecycle", "roberta"),
    report("oft", "merge", "roberta", refused="No."),
    report("oft", "export", "roberta", inexact="0.41"),
    report("outer_scale", "merge", "roberta"),
]
FOUND = {
    "lora": {
        "lifecycle": {"roberta": {"result": "failed", "said": "AssertionError: wrong"}},
        "merge": {"llama": {"result": "refused", "said": "not here."}, "roberta": {"result": "passed"}},
    },
    "oft": {
        "export": {"roberta": {"result": "inexact", "said": "0.41"}},
        "merge": {"roberta": {"result": "refused", "said": "No."}},
    },
}


def write(file: Path, reports: list[Any]) -> str:
    kept = Capabilities(file)
    for one in reports:
        kept.add(one)
    kept.write()
    return file.read_text(encoding="utf-8")


def test_the_file_is_the_same_in_any_order(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.json", REPORTS), write(tmp_path / "b.json", REPORTS[::-1])
    assert first == second and json.loads(first) == FOUND


def test_a_part_run_again_changes_that_part_alone(tmp_path: Path) -> None:
    write(tmp_path / "a.json", REPORTS)
    again = json.loads(write(tmp_path / "a.json", [report("lora", "lifecycle", "roberta")]))
    assert again["lora"]["lifecycle"]["roberta"] == {"result": "passed"}
    assert again["lora"]["merge"] == FOUND["lora"]["merge"] and again["oft"] == FOUND["oft"]


def test_methods_that_are_gone_are_forgotten(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"gone": {"merge": {"roberta": {"result": "passed"}}}}')
    assert json.loads(write(tmp_path / "a.json", [])) == {}


@pytest.mark.slow
def test_the_option_works_in_several_processes(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    only = "(series_adapter-roberta or lora-roberta) and (merge or quantized)"
    line = f"-m pytest -q tests/conformance -n 2 --capabilities {file} -p no:cacheprovider -k".split()
    subprocess.run([sys.executable, *line, only], check=True, cwd=Path(__file__).parents[2])
    found = json.loads(file.read_text())
    assert found["lora"]["merge_equals_unmerged"] == {"roberta": {"result": "passed"}}
    assert found["lora"]["quantized_base_works_or_is_refused"] == {"roberta": {"result": "passed"}}
    refused = found["series_adapter"]["merge_equals_unmerged"]["roberta"]
    assert refused["result"] == "refused" and "cannot be merged" in refused["said"]
