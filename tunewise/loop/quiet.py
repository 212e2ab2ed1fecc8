"""Trying something on a model without leaving a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from tunewise.core.checkpoint import get_rng, set_rng

__all__ = ["quiet"]


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; modes and the random state are afterwards what they were."""
    modes, state = {module: module.training for module in model.modules()}, get_rng()
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        set_rng(state)
        for module, mode in modes.items():
            module.training = mode
