"""The demo, small: every baseline and method measured, a table, a report, and nothing run twice."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest
from rich.console import Console

from tunewise import demo
from tunewise.assets import demo_rows
from tunewise.core.errors import UserError


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is learnt in three steps from few rows does not matter here; the whole way does."""
    file = tmp_path_factory.mktemp("data") / "peptides.jsonl"
    rows = demo_rows("peptides")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:150] + rows[-150:]), encoding="utf-8")
    common = {**demo.QUICK.common, "steps": 3, "max_length": 16}
    monkeypatch.setattr(demo, "QUICK", dataclasses.replace(demo.QUICK, data=str(file), common=common))


def test_quick_demo(tmp_path: Path) -> None:
    said: list[str] = []
    found = demo.run_demo(tmp_path / "d", quick=True, say=said.append)
    names = ["majority", "TF-IDF + logistic regression", "linear_probe", "bias_scale", "lora", "full"]
    assert [row["method"] for row in found.rows] == names
    for row in found.rows:
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
        assert row["trainable"] >= 0 and row["seconds"] >= 0
    for row in found.rows[2:]:
        assert row["peak_memory_mb"] > 0 and row["size_mb"] > 0
    trainable = [row["trainable"] for row in found.rows[2:]]
    assert trainable == sorted(trainable)
    page = found.report.read_text(encoding="utf-8")
    assert all(name in page for name in names)
    console = Console(width=140, record=True)
    console.print(found.table())
    printed = console.export_text()
    assert all(name in printed for name in names)

    start = time.perf_counter()
    again = demo.run_demo(tmp_path / "d", quick=True)
    assert [r["accuracy"] for r in again.rows] == [r["accuracy"] for r in found.rows]
    assert time.perf_counter() - start < 20


def test_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(UserError, match=r"holds thesis\.txt"):
        demo.run_demo(tmp_path, quick=True)
