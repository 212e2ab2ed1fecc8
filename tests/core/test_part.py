"""A part is a dataclass without being told so: options are validated, and misspellings answered."""

from __future__ import annotations

import copy
import inspect
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Field, PositiveInt

from tests.conformance import third_party
from tunewise.core.errors import UserError
from tunewise.core.part import Part, build_part, describe_part, nested, overrides, part_class
from tunewise.delta.lora import LoRA

from . import toys


class Score(Part):
    slot: ClassVar[str] = "diagnose"
    smooth: tuple[float, ...] = (0.5, 0.5)


class Ranker(Part):
    """All kinds of options."""

    slot: ClassVar[str] = "allocate"
    size: PositiveInt = 4
    share: Annotated[float, Field(ge=0, le=1)] = 0.5
    kind: Literal["row", "rank"] = "rank"
    names: list[str] = ["a"]
    table: dict[str, float] = {}
    score: Part = Score()
    more: list[Any] = []

    def after_step(self, run: Any) -> None:
        self.state["n"] = self.state.get("n", 0) + 1


def test_options_are_the_fields() -> None:
    part = Ranker(8, share=0.25)
    assert (part.size, part.share, part.kind) == (8, 0.25, "rank") and part == Ranker(
        8, share=0.25
    ) != Ranker(9)
    assert list(inspect.signature(Ranker).parameters)[:3] == ["size", "share", "kind"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sise": 3}, "Ranker has no option 'sise'; did you mean \"size\""),
        ({"size": 0}, "Ranker: size=0 is not valid: Input should be greater than 0"),
        ({"size": "many"}, "Ranker: size='many' is not valid"),
        ({"share": 1.5}, "Ranker: share=1.5 is not valid"),
        ({"kind": "column"}, "Ranker: kind='column' is not valid: Input should be 'row' or 'rank'"),
    ],
)
def test_wrong_options_are_one_sentence(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        Ranker(**options)
    assert "\n" not in str(caught.value)


def test_mutable_defaults_are_not_shared() -> None:
    a, b = Ranker(), Ranker()
    a.names.append("b")
    a.table["x"] = 1.0
    assert b.names == ["a"] and b.table == {}


def test_state_is_the_parts_own() -> None:
    a, b = Ranker(), Ranker()
    a.state |= {"n": 3}
    assert a.state == {"n": 3} and b.state == {} and a == b
    assert copy.deepcopy(a).state == {"n": 3}
    a.state = {}
    assert a.state == {}


def test_events_are_found_by_definition() -> None:
    assert overrides(Ranker(), "after_step") and not overrides(Ranker(), "prepare")
    assert not overrides(Score(), "after_step")


def test_nested_parts_are_found_at_any_depth() -> None:
    inner = Score((0.1,))
    part = Ranker(score=Ranker(score=inner), more=[Score(), {"no": 1}])
    assert [type(p).__name__ for p in nested(part)] == ["Ranker", "Ranker", "Score", "Score"]
    assert nested(part)[2] is part.score.score  # type: ignore[attr-defined]


def test_a_description_is_read_back() -> None:
    part = Ranker(2, names=["x"], table={"y": 0.5}, score=Score((0.1, 0.2)), more=[Score(), 3])
    described = describe_part(part)
    assert described["part"] == "Ranker" and described["score"] == {"part": "Score", "smooth": [0.1, 0.2]}
    assert build_part(described) == part
    with pytest.raises(UserError, match="Ranker: an option of type object cannot be saved"):
        describe_part(Ranker(more=[object()]))


def test_classes_are_found_by_name_in_the_rooms() -> None:
    assert part_class("LoRA") is LoRA and part_class("Ranker") is Ranker
    with pytest.raises(UserError, match='No part is called "Lora"; did you mean "LoRA"'):
        part_class("Lora")


@pytest.mark.parametrize("source", [third_party, toys.HalveRanks, toys.FeatureBank, toys.Rounds])
def test_third_party_parts_are_short(source: Any) -> None:
    assert len(inspect.getsource(source).splitlines()) < 40
