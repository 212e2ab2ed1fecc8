"""The core alone calls the parts: event after event, in slot order, then recipe order, gradients by stage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import UserError
from .part import EVENTS, STAGES, Part, nested, overrides
from .recipe import Recipe

if TYPE_CHECKING:
    from .run import Run

__all__ = ["Lifecycle", "call_order"]


def call_order(recipe: Recipe) -> dict[str, list[Part]]:
    """event -> the parts that define it, options of parts too, in the order in which they are called."""
    parts = [one for _, part in recipe.parts() for one in nested(part)]
    order = {event: [p for p in parts if overrides(p, event)] for event in EVENTS}
    for part in order["gradients"]:
        if part.stage not in STAGES:
            raise UserError(
                f"{type(part).__name__} has no gradient stage {part.stage!r}: {', '.join(STAGES)}."
            )
    order["gradients"].sort(key=lambda p: STAGES.index(p.stage))
    for stage in ("private", "project"):
        same = [type(p).__name__ for p in order["gradients"] if p.stage == stage]
        if len(same) > 1:
            raise UserError(f"Only one part may {stage} the gradients, not {' and '.join(same)}.")
    return order


class Lifecycle:
    """Fires the events of one run, and knows which were never fired."""

    def __init__(self, recipe: Recipe, run: Run | None) -> None:
        self.order = call_order(recipe)
        self.run: Any = run
        self.fired = dict.fromkeys(EVENTS, 0)

    def fire(self, event: str, *args: Any) -> Any:
        """Calls the event on every part that defines it; `select` threads its rows through."""
        self.fired[event] += 1
        result: Any = args[0] if event == "select" else None
        for part in self.order[event]:
            if event == "select":
                result = part.select(self.run, result)
            else:
                getattr(part, event)(self.run, *args)
        return result

    def unfired(self) -> str | None:
        """A sentence naming a part whose step events never came, or None."""
        for event in ("before_step", "gradients", "after_step", "prepare"):
            waiting = [
                p for p in self.order[event] if p.slot != "optimizer"
            ]  # that one may be the user's own
            if waiting and not self.fired[event]:
                names = ", ".join(type(p).__name__ for p in waiting)
                return (
                    f"{names} needs the event {event} and never got it: call handle.watch(optimizer) before training, "
                    "or give Trainer handle.callback()."
                )
        return None

    def state_dict(self) -> dict[str, int]:
        return dict(self.fired)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.fired.update(state)
