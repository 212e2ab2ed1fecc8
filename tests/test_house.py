"""The house rules that can be counted: sizes of the core and of files, and how fast a large model is adapted."""

from __future__ import annotations

import ast
import time
from pathlib import Path

import pytest
import torch

import tunewise as tw

ROOT = Path(__file__).parent.parent


def code_lines(path: Path) -> int:
    """Lines without blanks, comments and docstrings; ruff's formatting is checked elsewhere."""
    source = path.read_text(encoding="utf-8")
    documented: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and ast.get_docstring(node) is not None
        ):
            text = node.body[0]
            documented |= set(range(text.lineno, (text.end_lineno or text.lineno) + 1))
    lines = enumerate(source.splitlines(), start=1)
    return sum(
        bool(s) and not s.startswith("#") and n not in documented
        for n, s in ((n, t.strip()) for n, t in lines)
    )


def test_the_core_is_small() -> None:
    assert sum(code_lines(p) for p in (ROOT / "tunewise" / "core").glob("*.py")) < 2500


@pytest.mark.parametrize("folder", ["tunewise", "tests", "benchmarks"])
def test_files_are_short(folder: str) -> None:
    long = {p.name: n for p in (ROOT / folder).rglob("*.py") if (n := code_lines(p)) >= 300}
    assert not long


def test_methods_are_short() -> None:
    sizes = {p.stem: code_lines(p) for p in (ROOT / "tunewise" / "catalog").glob("*/*.py")}
    assert max(sizes.values()) < 60


def test_the_core_knows_no_room() -> None:
    rooms = (
        "delta",
        "head",
        "loop",
        "optim",
        "objective",
        "task",
        "data",
        "catalog",
        "backbone",
        "interop",
        "study",
    )
    for path in (ROOT / "tunewise" / "core").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert not any(node.module.startswith(f"tunewise.{room}") for room in rooms), (
                    path.name,
                    node.module,
                )


def test_a_seven_billion_model_is_adapted_within_a_second() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
    assert sum(p.numel() for p in model.parameters()) > 6e9
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        handle = tw.attach(model, "lora(rank=8)")
        best = min(best, time.perf_counter() - start)
        assert handle.trainable == 19_988_480
        handle.detach()
    assert best < 1.0
