"""Gradient checkpointing, where it saves something."""

from __future__ import annotations

from typing import Any

from tunewise.core.delta import forms
from tunewise.core.errors import UserError
from tunewise.core.run import Run

__all__ = ["checkpoint_activations"]


def checkpoint_activations(run: Run) -> None:
    """What blocks compute is computed again in the backward pass instead of kept, if the settings say so.

    Raises `UserError` with a side network: the backbone stays in evaluation mode beside it, in which transformers
    checkpoints nothing, and would keep a graph of its inputs besides.
    """
    if not run.settings.gradient_checkpointing:
        return
    reader = next((p for _, p in run.handle.deltas if "read" in forms(p)), None)
    if reader is not None:
        raise UserError(
            f"gradient_checkpointing saves nothing with {type(reader).__name__}: beside a side network the backbone "
            "stays in evaluation mode, in which nothing is checkpointed; leave the option out."
        )
    model: Any = run.model
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
