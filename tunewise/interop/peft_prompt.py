"""Soft prompts as PEFT keeps them, both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunewise.core.errors import UserError
from tunewise.core.handle import Handle, attach
from tunewise.core.recipe import Recipe
from tunewise.delta.prompt import SoftPrompt

from .peft_files import CONFIG, WEIGHTS, base_facts, write_files

__all__ = ["PROMPTS", "read_prompt", "write_prompt"]

PROMPTS = ("PROMPT_TUNING", "P_TUNING")
"""Both keep the finished vectors alone; the network that made those of P-tuning stays behind in training."""
# Where the checkpoint is from, how training started, and what the tensor itself tells.
_FREE = {
    "auto_mapping",
    "base_model_name_or_path",
    "encoder_dropout",
    "encoder_hidden_size",
    "encoder_num_layers",
    "encoder_reparameterization_type",
    "inference_mode",
    "num_attention_heads",
    "num_layers",
    "num_transformer_submodules",
    "num_virtual_tokens",
    "peft_type",
    "peft_version",
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "revision",
    "task_type",
    "token_dim",
    "tokenizer_kwargs",
    "tokenizer_name_or_path",
}


def write_prompt(handle: Handle, directory: str | Path, base_name: str | None) -> Path:
    """The prompt's vectors and options. Raises `UserError` beside other parts and for other models."""
    if len(handle.deltas) > 1 or handle.existing:
        raise UserError("PEFT keeps a soft prompt alone: it cannot hold other trained parts beside it.")
    model: Any = handle.model
    facts = base_facts(model, base_name, [])
    if facts["task_type"] != "CAUSAL_LM":
        raise UserError(
            "Soft prompts are written as PEFT checkpoints for causal language models alone, not for "
            f"{type(model).__name__}."
        )
    prompt: Tensor = handle.sites[0][2].get_parameter("P")
    tokens, width = prompt.shape
    config = {
        "peft_type": "PROMPT_TUNING",
        **facts,
        "num_virtual_tokens": tokens,
        "token_dim": width,
        "num_transformer_submodules": 1,
        "num_layers": model.config.num_hidden_layers,
        "num_attention_heads": model.config.num_attention_heads,
        "prompt_tuning_init": "RANDOM",
    }
    return write_files(directory, config, {"prompt_embeddings": prompt})


def read_prompt(
    model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], folder: Path, name: str
) -> Handle:
    """The prompt of a causal model, attached. Raises `UserError` for options and sizes that do not fit."""
    for option, value in config.items():
        if option not in _FREE and value not in (None, False) and value not in ([], {}, ""):
            raise UserError(f"{folder / CONFIG} uses {option}={value!r}, which Tunewise cannot read.")
    if config.get("task_type") != "CAUSAL_LM" or (config.get("num_transformer_submodules") or 1) != 1:
        raise UserError(
            f"{folder / CONFIG}: prompt tuning is read for task_type CAUSAL_LM alone, "
            f"not {config.get('task_type')!r}."
        )
    if set(tensors) != {"prompt_embeddings"}:
        raise UserError(f"{folder / WEIGHTS} must hold prompt_embeddings alone, not {sorted(tensors)}.")
    value = tensors["prompt_embeddings"]
    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
    width = getattr(embedding, "embedding_dim", None)
    if value.dim() != 2 or value.shape != (config.get("num_virtual_tokens"), width):
        raise UserError(
            f"{folder / WEIGHTS}: prompt_embeddings has the shape {tuple(value.shape)}; its options and this "
            f"model need {(config.get('num_virtual_tokens'), width)}."
        )
    handle = attach(
        model, Recipe(delta=SoftPrompt(tokens=len(value), keep=True), name="peft"), name=name, seed=0
    )
    with torch.no_grad():
        handle.sites[0][2].get_parameter("P").copy_(value)
    return handle
