"""A head says how the answer is read out of a model's outputs, and what of it is trained."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tunewise.core.delta import Delta
from tunewise.core.errors import UserError

__all__ = ["AUTO", "Head", "hidden_size", "label_names", "logits_of", "sequence_mask", "takes_positions"]

AUTO = ("sequence_classification", "base", "masked_lm", "causal_lm", "image_classification")


class Head(Delta):
    """logits = read(outputs of the model): `[rows, classes]`, or `[rows, tokens, words]` for language models.

    What is trained comes from a delta's own means: `existing(model)` names parameters of the model's own
    head, and `tensors(site)` gives new ones at the root site, read as `t.NAME` in `logits`. Whatever `setup`
    learns is kept in fields, so that a saved recipe can read its answers again. `asks` is what the model must be
    called with besides a batch, so that its outputs hold what is read.
    """

    slot: ClassVar[str] = "head"
    kinds: ClassVar[tuple[str, ...]] = ("model",)
    auto: ClassVar[str] = "base"
    asks: ClassVar[dict[str, Any]] = {}

    def auto_for(self, config: Any) -> str:
        """Which kind of model (one of `AUTO`) this head reads, given the configuration of the backbone."""
        return self.auto

    def setup(self, task: Any, tokenizer: Any, model: nn.Module) -> None:
        """Before attaching: learns sizes and words; raises `UserError` for a head that cannot work."""

    def logits(self, t: Any, outputs: Any, batch: Any) -> Tensor:
        """The logits that the task's loss gets; t holds the head's own tensors in float32."""
        return logits_of(outputs)


def logits_of(outputs: Any) -> Tensor:
    """`outputs.logits`, or the outputs themselves of a plain module that gives one tensor."""
    logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        raise UserError(f"The model gives {type(outputs).__name__} without logits: load it with a head.")
    return logits


def label_names(task: Any) -> list[str]:
    """The names of the task's classes in the order of the logits; empty for a task without classes."""
    return [str(label) for label in getattr(task, "labels", None) or ()]


def hidden_size(model: nn.Module, head: str) -> int:
    """Width of the model's last hidden state. Raises `UserError` where the model does not say it."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(config, "hidden_size", None)
    if not isinstance(size, int):
        raise UserError(f"{head} cannot read {type(model).__name__}: its configuration gives no hidden_size.")
    return size


def sequence_mask(inputs: dict[str, Tensor], shape: Sequence[int], device: torch.device) -> Tensor:
    """Which positions hold real tokens, `[rows, tokens]` of bool; all if the batch has no mask (images)."""
    mask = inputs.get("attention_mask")
    return torch.ones(tuple(shape), dtype=torch.bool, device=device) if mask is None else mask.bool()


def takes_positions(model: nn.Module) -> bool:
    """Whether the model can be told positions; without, decoders count padding on the left too."""
    return "position_ids" in inspect.signature(model.forward).parameters
