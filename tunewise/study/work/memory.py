"""What memory a trial takes by itself, inside a worker that keeps things for others too."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tunewise.study.work.commons import Base, objects, read_brief

__all__ = ["MIB", "held_now", "peak_of", "size_of", "warm_up", "weights_of"]

MIB = 2**20

_libraries: dict[str, int] = {}


def warm_up(study: str) -> None:
    """Imports what trials need, and looks what memory that takes, before a base model is loaded."""
    if _libraries:
        return
    import accelerate  # noqa: F401
    import sklearn.linear_model  # noqa: F401
    import torch
    import transformers  # noqa: F401

    import tunewise.loop.probe  # noqa: F401
    from tunewise.machine import resident

    torch.zeros(2, 2).requires_grad_().sum().backward()
    read_brief(study)
    _libraries["bytes"] = resident()


def size_of(tensors: Iterable[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def weights_of(base: Base) -> int:
    """Bytes of the base model."""
    return size_of([*base.model.parameters(), *base.model.buffers()])


def held_now() -> int:
    """Bytes that are taken before a trial begins: of the GPU where there is one, else of this process."""
    import torch

    from tunewise.machine import resident

    return torch.cuda.memory_allocated() if torch.cuda.is_initialized() else resident()


def peak_of(study: str, taken: int, handle: Any, base: Base) -> float:
    """MiB that a process takes which does this alone: without what the worker keeps for others, and without the
    originals of trained base weights, which are only there to be put back. On a GPU, what its tensors take.
    """
    import torch

    held = objects.get(study)
    inside = (
        held is not None and held.model is not None
    )  # the user's own model was there before the libraries
    outside = 0 if torch.cuda.is_initialized() else _libraries["bytes"] - (weights_of(base) if inside else 0)
    originals = size_of(e.original for e in handle.existing.values())
    return (taken - originals + weights_of(base) + outside) / MIB
