"""The reader: dotted and file names survive, values are plain, nothing is run, errors point at the place."""

from __future__ import annotations

import ast

import pytest

from tunewise.core.errors import UserError
from tunewise.core.reader import literal, parse, source_of


def calls(text: str) -> tuple[str, dict[str, object]]:
    node = parse(text, "method")
    assert isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    return node.func.id, {kw.arg or "**": literal(kw.value) for kw in node.keywords}


def test_recipe_with_values() -> None:
    text = 'lora(rank=8, lambda=1e-3, b=-2, s="query | x.y", t=[1, true, null], d={"a": (1, None)}, e=False)'
    values = {
        "rank": 8,
        "lambda": 1e-3,
        "b": -2,
        "s": "query | x.y",
        "t": [1, True, None],
        "d": {"a": (1, None)},
        "e": False,
    }
    assert calls(text) == ("lora", values)


@pytest.mark.parametrize(
    "name", ["./mine.py:hira", "../a-b/mine.py:hira", "/tmp/x.py:f", "mine.py:f", "ä/mine.py:f", "a.b.c"]
)
def test_names_of_files_and_modules(name: str) -> None:
    assert calls(f"{name}(rank=4)") == (name, {"rank": 4})
    node = parse(f"lora(a=0.5) + {name}", "method")
    assert isinstance(node, ast.BinOp) and isinstance(node.right, ast.Name) and node.right.id == name


@pytest.mark.parametrize("name", ["layers.3.mlp.down_proj", "a.self.class.0", "x.1e3.y", "lambda", "h.0"])
def test_dotted_names(name: str) -> None:
    node = parse(f"query | ~{name} & 'layers.3.b'", "selector")
    assert isinstance(node, ast.BinOp)
    assert [n.id for n in ast.walk(node) if isinstance(n, ast.Name)] == ["query", name]
    assert name in source_of(node)


@pytest.mark.parametrize(
    "text", ["__import__('os')", "a.b", "[x for x in y]", "1 + 1", "f'{x}'", "b'x'", "{**a}", "not True"]
)
def test_only_plain_values(text: str) -> None:
    with pytest.raises(UserError):
        literal(parse(text, "value"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a b",
        "(a",
        "a |",
        "x = 1",
        "import os",
        "a\x00b",
        "a  # b",
        "a | " * 400 + "a",
        "-" * 400 + "1",
        "a" * 30_000,
        "(" * 500 + "a" + ")" * 500,
    ],
)
def test_unreadable(text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(text, "selector")
    assert "selector" in str(caught.value)


def test_points_at_the_place() -> None:
    with pytest.raises(UserError, match=r"at character 3, \"b\""):
        parse("a b", "selector")
    with pytest.raises(UserError, match='goes in quotes: "r"'):
        literal(parse("r", "value"))
