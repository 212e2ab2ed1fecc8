"""Where side networks write that answer a classification: the last layer of the model's own classifier."""

from __future__ import annotations

from collections.abc import Sequence

from tunewise.core.errors import UserError
from tunewise.sites import Site

__all__ = ["last_classifier", "pixel_site"]


def last_classifier(everything: Sequence[Site], name: str) -> list[Site]:
    """The last linear layer of the classifier. Raises `UserError` for a model without one."""
    found = [s for s in everything if s.kind == "linear" and s.role == "head"]
    if not found:
        raise UserError(
            f"{name} adds to the logits of a classifier, and this model has none: load it with one."
        )
    return found[-1:]


def pixel_site(everything: Sequence[Site], name: str) -> Site:
    """The convolution that is given the image. Raises `UserError` for a model that sees none."""
    found = next((s for s in everything if s.kind == "conv" and s.in_features in (1, 3)), None)
    if found is None:
        raise UserError(f"{name} reads images, and this model has no layer that sees pixels.")
    return found
