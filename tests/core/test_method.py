"""Methods as text: strings, YAML and files of one's own; PEFT's spellings are answered with ours."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest

from tests.models import tiny
from tunewise.core.errors import UserError
from tunewise.core.handle import attach
from tunewise.core.method import PEFT_SPELLINGS, get_method, method, method_names, read_recipe, read_yaml
from tunewise.core.part import Part
from tunewise.core.recipe import Recipe
from tunewise.delta.lora import LoRA

MINE = '''
from tunewise import P, Delta, Recipe, method


class Hira(Delta):
    """W' = W * (1 + B A), element-wise."""

    order = "multiply"
    rank: int = 2

    def tensors(self, site):
        import torch
        return {"A": P(torch.randn(self.rank, site.in_features), "direction", 0),
                "B": P(torch.zeros(site.out_features, self.rank), "direction", 1)}

    def weight(self, t, W):
        return W * (1 + t.B @ t.A)


@method("hira", title="Hadamard")
def hira(rank: int = 2):
    """W' = W * (1 + B A)."""
    return Recipe(delta=Hira(rank))
'''


class Eva(Part):
    slot: ClassVar[str] = "diagnose"
    samples: int = 8


class Sampler(Part):
    slot: ClassVar[str] = "data"
    start: Part | None = None
    several: list[Part] = []
    rate: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    on: bool = True
    name: str | None = None


def test_strings_are_read_with_options_and_plus() -> None:
    recipe = read_recipe('lora(rank=4, alpha=2e-1, sites="query | value") + Sampler(rate=-1.5)')
    (delta,), (data,) = recipe["delta"], recipe["data"]
    assert delta == LoRA(4, 0.2, sites="query | value") and data == Sampler(rate=-1.5)
    assert recipe.name.startswith("lora(rank=4, alpha=0.2") and read_recipe("lora(4)")["delta"] == [LoRA(4)]


def test_nested_parts_and_plain_values() -> None:
    given = "LoRA(2) + Sampler(start=Eva(samples=3), several=[Eva, Eva(9)], betas=(0.5, 1e-3), on=false, name=null)"
    (part,) = read_recipe(given)["data"]
    assert part == Sampler(Eva(3), [Eva(), Eva(9)], betas=(0.5, 1e-3), on=False, name=None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lroa", 'There is no method "lroa"; did you mean "lora"'),
        ("Lora(rank=4)", 'No part is called "Lora"'),
        ("lora(rnak=4)", 'lora has no option "rnak"; did you mean "rank"'),
        ("lora(r=8)", 'lora has no option "r": here it is called "rank"'),
        ("lora(lora_alpha=8)", 'here it is called "alpha"'),
        ("lora(target_modules=['q'])", 'here it is called "sites"'),
        ("lora(learning_rate=1e-3)", 'here it is called "--lr"'),
        ("lora(rank=high)", 'a text goes in quotes: "high"'),
        ("lora(rank=1+1)", "is not a plain number"),
        ("lora(**x)", "takes options written as name=value"),
        ("lora(1, 2, 3, 4, 5, 6, 7)", "lora: too many positional arguments"),
        ("lora(rank='x')", "LoRA: rank='x' is not valid"),
        ("lora - ladder", "is not a method; write for example"),
        ("__import__('os').system('true')", "is not"),
        ("lora(", "cannot be read"),
        ("", "is empty"),
    ],
)
def test_wrong_text_is_answered_in_one_sentence(text: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        read_recipe(text)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_every_peft_spelling_names_an_option_of_ours() -> None:
    parameters = {p for n in method_names() for p in get_method(n).signature.parameters}
    for ours in PEFT_SPELLINGS.values():
        assert ours.startswith("--") or ours in parameters | {"tokens", "init"}


def test_a_file_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    for spec in ("./mine.py:hira", f"{tmp_path}/mine.py:hira(rank=3) + parallel_adapter"):
        handle = attach(tiny("llama"), spec)
        assert any(k == "hira" for k, _, _ in handle.sites)
    with pytest.raises(UserError, match='mine.py defines no method "hria"; did you mean "hira"'):
        read_recipe("./mine.py:hria")
    with pytest.raises(UserError, match="The file ./none.py of the method ./none.py:hira does not exist"):
        read_recipe("./none.py:hira")


def test_yaml_numbers_are_numbers() -> None:
    found = read_yaml("a: 2e-5\nb: 1E3\nc: -.5e2\nd: '2e-5'\ne: 3\nf: 1e\ng: [5e-1]", "x")
    assert found == {"a": 2e-5, "b": 1e3, "c": -50.0, "d": "2e-5", "e": 3, "f": "1e", "g": [0.5]}
    with pytest.raises(UserError, match="x is not valid YAML"):
        read_yaml("a: [", "x")
    with pytest.raises(UserError, match="x is not valid YAML"):
        read_yaml("!!python/object/apply:os.system ['true']", "x")


@pytest.mark.parametrize(
    "text",
    ["lora: {rank: 4, alpha: 2e-1}", "method: lora\nrank: 4\nalpha: 2e-1", "- lora:\n    rank: 4\n    alpha: 2e-1",
     "lora(rank=4, alpha=2e-1)", "method: lora(rank=4, alpha=2e-1)"],
)  # fmt: skip
def test_a_recipe_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    assert read_recipe(tmp_path / "r.yaml")["delta"] == [LoRA(4, 0.2)]


def test_a_recipe_file_composes(tmp_path: Path) -> None:
    (tmp_path / "r.yml").write_text("- lora: {rank: 4}\n- parallel_adapter\n- Sampler(rate=2e-5)\n")
    recipe = read_recipe(str(tmp_path / "r.yml"))
    assert [type(p).__name__ for p in recipe["delta"]] == ["LoRA", "ParallelAdapter"]
    assert recipe["data"] == [Sampler(rate=2e-5)]


@pytest.mark.parametrize(
    ("text", "words"),
    [("lora: 8", "the options of lora must be a mapping, not 8"), ("- 3", "expected a method"), ("[]", "is empty"),
     ("lora: {r: 8}", 'here it is called "rank"')],
)  # fmt: skip
def test_wrong_recipe_files_are_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=words):
        read_recipe(tmp_path / "r.yaml")
    with pytest.raises(UserError, match="The recipe file none.yaml does not exist"):
        read_recipe("none.yaml")


def test_a_method_knows_what_the_catalog_shows() -> None:
    @method("toy", title="A toy", lr=(1e-4, 1e-3))
    def toy(rank: int = 2) -> Recipe:
        """W' = W.

        More words.
        """
        return Recipe(delta=LoRA(rank))

    assert get_method("toy") is toy and "toy" in method_names()
    assert (toy.formula, toy.area, toy.lr) == ("W' = W.", "yours", (1e-4, 1e-3))
    assert toy(3).name == "toy(rank=3)" and toy().name == "toy" and toy().lr == toy.lr
    assert get_method("lora").area == "lowrank"


@pytest.mark.parametrize("name", [n for n in method_names() if n != "outer_scale"])
def test_the_first_line_of_a_method_is_its_equation(name: str) -> None:
    found = get_method(name)
    assert any(sign in found.formula for sign in ("=", "[", "min")), found.formula
    assert found.facts.get("title") and found.signature.parameters is not None
