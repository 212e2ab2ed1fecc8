"""The model's own classification head, as Hugging Face builds it."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from tunewise.core.errors import UserError, did_you_mean

from .base import Head, label_names, takes_positions

__all__ = ["ClassHead", "has_classifier"]

# What timm, torchvision and plain modules call the last layer.
HEADS = ("classifier", "score", "classification_head", "head", "heads", "fc")


class ClassHead(Head):
    """logits = the model's own classifier(pooled state), `[rows, classes]`, `[rows, 1]` for regression.

    pooler  whether the pooler in front of the classifier (BERT, ALBERT, DeBERTa) is trained too. It belongs
            to the read-out: many encoders come with one that their pretraining never used.
    modules names of the head's modules, for models that transformers does not know
    Raises `UserError` for a model without a classification head or with another number of classes.
    """

    auto: ClassVar[str] = "sequence_classification"
    pooler: bool = True
    modules: str | list[str] | None = None

    def auto_for(self, config: Any) -> str:
        """Models that only know images are loaded as image classifiers."""
        from transformers import (
            MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
            MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        )

        text = type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
        image = type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
        return "image_classification" if image and not text else self.auto

    def setup(self, task: Any, tokenizer: Any, model: nn.Module) -> None:
        self.existing(model)
        wanted = len(label_names(task)) or 1
        found = getattr(getattr(model, "config", None), "num_labels", wanted)
        if found != wanted:
            raise UserError(
                f"{type(model).__name__} gives {found} classes and the task has {wanted}: "
                "load the base model with the task's labels."
            )
        if hasattr(model, "score"):
            # Decoders answer at the last token that is no padding. Behind a soft prompt they see no ids and
            # take the last column: the two are the same when the padding is on the left.
            task.pad_side, task.position_ids = "left", takes_positions(model)

    def existing(self, model: nn.Module) -> dict[str, str]:
        """Everything outside the base model, and the base model's pooler; or what `modules` names."""
        if self.modules is not None:
            return dict.fromkeys(_named(model, self.modules), "head")
        names = _head_names(model)
        if not has_classifier(model):
            raise UserError(
                f"ClassHead: {type(model).__name__} has no classification head; load it as a model for "
                "sequence classification, name the head with ClassHead(modules=...), or use PooledHead()."
            )
        return {name: "head" for name in names if self.pooler or "pooler" not in name.split(".")}


def has_classifier(model: nn.Module) -> bool:
    """Whether the model has a classification head of its own; a pooler alone is none."""
    return any("pooler" not in name.split(".") for name in _head_names(model))


def _named(model: nn.Module, modules: str | list[str]) -> list[str]:
    known = dict(model.named_modules())
    found: list[str] = []
    for name in [modules] if isinstance(modules, str) else modules:
        if name not in known:
            raise UserError(f'ClassHead: the model has no module "{name}"{did_you_mean(name, known)}')
        found += [f"{name}.{n}" for n, _ in known[name].named_parameters() if ".tw_" not in f".{n}"]
    return found


def _head_names(model: nn.Module) -> list[str]:
    names = [n for n, _ in model.named_parameters() if ".tw_" not in f".{n}"]
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and hasattr(model, prefix):
        if getattr(model, "get_output_embeddings", lambda: None)() is not None:
            return []  # a language model's output layer names words, not classes
        return [n for n in names if not n.startswith(f"{prefix}.") or "pooler" in n.split(".")]
    if prefix:
        return []
    return [n for n in names if n.split(".")[0] in HEADS]
