"""Reading a class out of an image model: its own classifier, or a new one on a bare encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tunewise.core.delta import P
from tunewise.core.errors import UserError
from tunewise.sites import Site

from .base import Head, hidden_size, label_names, logits_of
from .classification import ClassHead, has_classifier

__all__ = ["GivenHead", "ImageHead"]


class ImageHead(Head):
    """logits = the model's own classifier, or W [class token; mean of the patches] + b on a bare encoder.

    A model is loaded with a classifier where transformers has one for it (new weights if the checkpoint brings
    none); its parameters are trained. A module without one gets W `[classes, inputs]` and b at zero, in float32.
    pooling  of a bare encoder: "both" (as DINOv2's classifier reads it), "first" (class token) or "mean" (patches);
             prompts and registers between them are left out, maps of convolutions are averaged
    outputs  number of classes, own: whether the classifier is the model's; both learnt from task and model
    """

    auto: ClassVar[str] = "base"
    pooling: Literal["both", "first", "mean"] = "both"
    outputs: int | None = None
    own: bool = False

    def auto_for(self, config: Any) -> str:
        return image_kind(config)

    def setup(self, task: Any, tokenizer: Any, model: nn.Module) -> None:
        self.outputs = len(label_names(task)) or 1
        self.own = has_classifier(model)
        if self.own:
            ClassHead().setup(task, tokenizer, model)
        else:
            self._width(model)

    def existing(self, model: nn.Module) -> dict[str, str]:
        return ClassHead().existing(model) if self.own else {}

    def tensors(self, site: Site) -> dict[str, P]:
        if self.own:
            return {}
        if self.outputs is None:
            raise UserError("ImageHead does not know its number of classes: give outputs=N.")
        weight = torch.zeros(self.outputs, self._width(site.module))
        return {"weight": P(weight, tag="head"), "bias": P(torch.zeros(self.outputs), tag="head")}

    def _width(self, model: nn.Module) -> int:
        sizes = getattr(getattr(model, "config", None), "hidden_sizes", None)
        if sizes:  # convolutions: one mean over the last map
            return int(sizes[-1])
        return hidden_size(model, "ImageHead") * (2 if self.pooling == "both" else 1)

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        return 0 if self.own else (self.outputs or 0) * (self._width(site.module) + 1)

    def logits(self, t: Any, outputs: Any, batch: Any) -> Tensor:
        if self.own:
            return logits_of(outputs)
        hidden = outputs if isinstance(outputs, Tensor) else getattr(outputs, "last_hidden_state", None)
        if hidden is None:
            raise UserError(f"ImageHead: {type(outputs).__name__} has no hidden states; load a base model.")
        hidden = hidden.float()
        if hidden.dim() == 4:
            return hidden.mean((2, 3)) @ t.weight.T + t.bias  # type: ignore[no-any-return]
        first, patches = hidden[:, 0], hidden[:, -patch_count(t.root, batch, hidden) :].mean(1)
        pooled = {"both": torch.cat([first, patches], 1), "first": first, "mean": patches}[self.pooling]
        return pooled @ t.weight.T + t.bias  # type: ignore[no-any-return]


def patch_count(model: nn.Module, batch: Any, hidden: Tensor) -> int:
    """How many of the last states are patches; all but the first where the model does not say."""
    size = getattr(getattr(model, "config", None), "patch_size", None)
    sides = size if isinstance(size, (list, tuple)) else (size, size)
    pixels = batch.inputs["pixel_values"]
    if not isinstance(sides[0], int):
        return hidden.shape[1] - 1
    count = (pixels.shape[-2] // sides[0]) * (pixels.shape[-1] // sides[1])
    return min(int(count), hidden.shape[1])


class GivenHead(Head):
    """logits = those of the model as they are: what answers is a delta that writes them, nothing here is trained."""

    auto: ClassVar[str] = "image_classification"

    def auto_for(self, config: Any) -> str:
        return ClassHead().auto_for(config)

    def logits(self, t: Any, outputs: Any, batch: Any) -> Tensor:
        return logits_of(outputs)


def image_kind(config: Any) -> str:
    """ "image_classification" where transformers has a classifier for these models, else "base"."""
    from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

    return "image_classification" if type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING else "base"
