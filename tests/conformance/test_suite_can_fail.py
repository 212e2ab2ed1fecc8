"""The suite can fail: every check passes for a sound part and catches parts broken on purpose."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tunewise.core.part import Part
from tunewise.core.recipe import Recipe

from . import forward_checks, interchange_checks, keeping_checks, training_checks
from .broken import BROKEN, Dead, Sound
from .support import Case

CHECKS: dict[str, Callable[..., None]] = {
    name: check
    for module in (forward_checks, keeping_checks, interchange_checks, training_checks)
    for name, check in vars(module).items()
    if name.startswith("check_")
}
SLOW = {"check_compiles"}
GIVEN: dict[str, dict[str, Any]] = {
    "check_quantized": {"real": False},
    "check_lifecycle": {"accumulation": 4},
}


def spare(model: nn.Module) -> None:
    """A linear layer that no forward pass calls."""
    model.spare = nn.Linear(4, 4)


def case_of(part: type[Part]) -> Case:
    def recipe() -> Recipe:
        made = Recipe.of(part())
        return made if made["delta"] else Recipe.of(Sound()) + made

    return Case(part.__name__, recipe, lr=3e-3, change=spare if part is Dead else None)


def run(check: str, case: Case, folder: Path) -> None:
    """The check with whatever else it asks for; a check that skips has checked nothing."""
    options = dict(GIVEN.get(check, {}))
    if "folder" in inspect.signature(CHECKS[check]).parameters:
        options["folder"] = folder
    try:
        CHECKS[check](case, **options)
    except pytest.skip.Exception as skipped:
        pytest.fail(f"{check} was skipped: {skipped}")


def pairs() -> Iterator[Any]:
    for check, parts in BROKEN.items():
        for part in parts:
            marks = [pytest.mark.slow] if check in SLOW else []
            yield pytest.param(check, part, id=f"{part.__name__}-{check}", marks=marks)


def test_every_check_is_tried() -> None:
    assert set(BROKEN) == set(CHECKS)


@pytest.mark.parametrize(("check", "part"), pairs())
def test_broken_part_is_caught(check: str, part: type[Part], tmp_path: Path) -> None:
    caught = (AssertionError, AttributeError) if check == "check_pickle" else AssertionError
    with pytest.raises(caught):
        run(check, case_of(part), tmp_path)


@pytest.mark.parametrize("check", sorted(set(BROKEN) - SLOW - {"check_linear"}))
def test_sound_part_passes(check: str, tmp_path: Path) -> None:
    case = Case("Sound", lambda: Recipe.of(Sound()), lr=3e-3)
    run(check, case, tmp_path)
