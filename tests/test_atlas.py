"""docs/atlas.md is what its script writes from the catalog and the result files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from docs import make_atlas
from tunewise.core.method import get_method

FILE = Path(make_atlas.__file__).parent / "atlas.md"
NAMES = [m.name for m in make_atlas.catalog()]


def cells(text: str, name: str) -> dict[str, str]:
    """The row of a method by heading."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    split = [line.replace("\\|", "\x00")[2:-2].split(" | ") for line in lines]
    (found,) = (c for c in split if c[1].startswith(f"**{name}**:"))
    return dict(zip(split[0], (c.replace("\x00", "|") for c in found), strict=True))


def test_the_atlas_in_the_tree_is_current() -> None:
    assert FILE.read_text(encoding="utf-8") == make_atlas.render(), "run `make atlas`"


@pytest.mark.parametrize("name", NAMES)
def test_every_method_has_a_row(name: str) -> None:
    row, method = cells(FILE.read_text(encoding="utf-8"), name), get_method(name)
    assert row["equation"] == f"`{method.formula}`"
    assert all(option in row["options and defaults"] for option in method.signature.parameters)
    assert f'--method "{name}"' in row["use"]


def result(**bases: str) -> dict[str, Any]:
    return {base: {"result": found, "said": f"{found}."} for base, found in bases.items()}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Result files of three methods; the suite refused `full` on one model altogether."""
    merge, step, several = (make_atlas.CAPABILITIES[n] for n in ("merge", "base at step 0", "several"))
    found = {
        "lora": {merge: result(roberta="passed", llama="passed"), step: result(roberta="passed")},
        "full": {
            merge: result(roberta="passed", llama="refused"),
            several: result(llama="refused"),
            make_atlas.COUNTED: result(roberta="passed", llama="refused"),
        },
        "oft": {
            merge: result(roberta="refused", llama="passed"),
            several: result(roberta="failed", llama="passed"),
        },
    }
    figures = {"loss": 0.25, "accuracy": 0.9, "seconds_per_step": 0.5}
    trained = {
        "model": "m",
        "data": "d",
        "steps": 9,
        "seeds": [0, 1],
        "probe": {"loss": 0.42, "accuracy": 0.8},
        "methods": {"lora": figures, "oft": {**figures, "seconds_per_step": 1.0}, "full": {"loss": None}},
        "unfinished": ["dora"],
    }
    pictured = {**trained, "methods": {"vpt": figures}, "unfinished": []}
    (tmp_path / "capabilities.json").write_text(json.dumps(found))
    (tmp_path / "deltas.json").write_text(json.dumps(trained))
    (tmp_path / "vision.json").write_text(json.dumps(pictured))
    monkeypatch.setattr(make_atlas, "RESULTS", tmp_path)
    return tmp_path


def test_columns_come_from_the_result_files(results: Path) -> None:
    text = make_atlas.render()
    lora, full, oft, other = (cells(text, n) for n in ("lora", "full", "oft", "dora"))
    vpt, copilot = (cells(text, n) for n in ("vpt", "copilot"))
    assert (lora["merge"], lora["base at step 0"], lora["several"]) == ("yes", "yes", "")
    assert (full["merge"], full["base at step 0"], full["loss"]) == ("yes", "no", "failed")
    assert (oft["merge"], oft["several"]) == ("on llama", "failed")
    assert (oft["loss"], oft["accuracy"], oft["step"]) == ("0.250", "0.900", "2.00")
    assert (vpt["loss"], vpt["image loss"], vpt["image step"]) == ("", "0.250", "")
    assert (copilot["loss"], other["loss"], cells(text, "linear_probe")["loss"]) == (
        "random models only",
        "",
        "",
    )
    assert lora["step"] == "1.00" and other["merge"] == other["base at step 0"] == ""
    assert "- oft: refused." in text and "the linear probe has 0.420 and 0.800" in text
    assert "**full** is not taken by the llama of the suite: refused." in text


def test_nothing_is_claimed_without_result_files(results: Path) -> None:
    for file in results.iterdir():
        file.unlink()
    text = make_atlas.render()
    assert cells(text, "lora")["merge"] == "" and "What is refused" not in text
