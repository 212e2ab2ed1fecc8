"""What a part needs and gives is declared and checked before anything is loaded or trained."""

from __future__ import annotations

from .delta import Delta, forms
from .errors import UserError
from .lifecycle import call_order
from .part import Part
from .recipe import Recipe

__all__ = ["NEEDS", "check", "facts"]

NEEDS = {
    "mergeable": ("a mergeable delta", "lora"),
    "components": ("a delta with components (low rank)", "lora"),
    "backprop": ("gradients from backpropagation", "the default optimizer"),
    "per_sample": ("per-sample gradients", "the default optimizer"),
    "second_order": ("second derivatives", "the default optimizer"),
    "internals": ("the plain form of the deltas", "lora"),
    "sizes": ("a delta whose size can change", "lora"),
    "routing": ("a delta whose routers choose experts", "mola"),
    "frozen_backbone": ("a backbone without backward pass", "a side network"),
}


def facts(recipe: Recipe) -> set[str]:
    """What the recipe's parts give together, so that others may need it."""
    from .merge import mergeable

    deltas = [p for p in recipe["delta"] if isinstance(p, Delta)]
    given = {g for _, p in recipe.parts() for g in p.gives}
    optimizer = recipe.single("optimizer")
    if optimizer is None or "zeroth_order" not in optimizer.gives:
        given |= {"backprop", "second_order", "per_sample", "internals"}
    if deltas and all(mergeable(d) for d in deltas):
        given.add("mergeable")
    if deltas and all("read" in forms(d) for d in deltas):
        given.add("frozen_backbone")
    return given


def check(recipe: Recipe) -> None:
    """Raises `UserError`, one sentence with the nearest possible recipe, when the parts cannot work together."""
    if not recipe["delta"] and not recipe["head"]:
        names = recipe.name or "The recipe"
        raise UserError(
            f"{names} trains nothing: add a delta, for example {recipe.name + ' + ' if recipe.name else ''}lora."
        )
    call_order(recipe)
    given = facts(recipe)
    for slot, part in recipe.parts():
        for need in sorted(part.needs - given):
            what, instead = NEEDS.get(need, (need, "another method"))
            blocker = _blocker(recipe, need, part)
            raise UserError(
                f"{recipe.name}: {type(part).__name__} ({slot}) needs {what}"
                f"{', which ' + blocker + ' does not give' if blocker else ''}; "
                f"the nearest possible recipe uses {instead}."
            )


def _blocker(recipe: Recipe, need: str, asking: Part) -> str:
    candidates = (
        recipe["optimizer"] if need in ("backprop", "per_sample", "second_order") else recipe["delta"]
    )
    return next((type(p).__name__ for p in candidates if p is not asking and need not in p.gives), "")
