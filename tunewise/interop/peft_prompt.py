"""Prompts and prefixes as PEFT keeps them, both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunewise.core.delta import Delta, forms
from tunewise.core.errors import UserError, did_you_mean
from tunewise.core.handle import Handle, attach
from tunewise.core.recipe import Recipe
from tunewise.delta.multitask_prompt import MultitaskPrompt
from tunewise.delta.positions import ShiftedPositions
from tunewise.delta.prefix import Prefix
from tunewise.delta.prompt import SoftPrompt
from tunewise.delta.prompt_encoder import EncodedPrompt

from .peft_files import CONFIG, WEIGHTS, base_facts, write_files
from .peft_prefix import prefix_matrix, prefix_parts
from .peft_trained import split_trained, trained_parameters, trained_parts

__all__ = ["PROMPTS", "holds_prompt", "read_prompt", "write_prompt"]

PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING")
TASKS = ("CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION")
VECTORS, COLUMNS, ROWS = "prompt_embeddings", "prefix_task_cols", "prefix_task_rows"
BASE = "base_model."
# Where the checkpoint is from, how training started, what made the vectors in training, and what tensors tell.
_FREE = {
    "auto_mapping",
    "base_model_name_or_path",
    "encoder_dropout",
    "encoder_hidden_size",
    "encoder_num_layers",
    "encoder_reparameterization_type",
    "inference_mode",
    "init_weights",
    "modules_to_save",
    "num_attention_heads",
    "num_layers",
    "num_ranks",
    "num_tasks",
    "num_transformer_submodules",
    "num_virtual_tokens",
    "peft_type",
    "peft_version",
    "prefix_projection",
    "prompt_tuning_init",
    "prompt_tuning_init_state_dict_path",
    "prompt_tuning_init_task",
    "prompt_tuning_init_text",
    "revision",
    "task_type",
    "token_dim",
    "tokenizer_kwargs",
    "tokenizer_name_or_path",
}


def holds_prompt(handle: Handle) -> bool:
    """Whether the adaptation has a prompt or a prefix of a kind that PEFT has too."""
    known = (SoftPrompt, EncodedPrompt, MultitaskPrompt)
    return any(type(p) in known or isinstance(p, Prefix) for _, p in handle.deltas)


def write_prompt(handle: Handle, directory: str | Path, base_name: str | None) -> Path:
    """The prompt's vectors and options, and the trained head beside it.

    PEFT's decoders that classify read the last position, padding or not: there, rows agree when padded on the left.
    Raises `UserError` beside other parts, for other models, and for prompts that stand elsewhere than in front.
    """
    part: Any = next(p for _, p in handle.deltas if isinstance(p, (SoftPrompt, Prefix)))
    for _, other in handle.deltas:
        if other is not part and not isinstance(other, ShiftedPositions) and _acts(handle, other):
            raise UserError("PEFT keeps a soft prompt alone: it cannot hold other trained parts beside it.")
    if getattr(part, "place", "front") != "front":
        raise UserError("PEFT puts soft prompts in front of everything, not behind the first token.")
    tensors, options = _written(handle, part)
    model, trained = handle.model, trained_parameters(handle)
    modules, biases = split_trained(model, trained, "a soft prompt", [])
    if biases:
        raise UserError(
            f"PEFT keeps whole modules beside a soft prompt, and of {biases[0]} only the bias is trained."
        )
    if getattr(model, "base_model_prefix", None) in modules:
        raise UserError(
            "PEFT keeps a trained head beside a soft prompt, not a trained backbone; keep the run and load it with "
            "tw.restore."
        )
    facts = base_facts(model, base_name, modules)
    kind = type(model).__name__
    if facts["task_type"] is None and "For" not in kind:
        facts |= {"task_type": "FEATURE_EXTRACTION", "auto_mapping": None}
    if facts["task_type"] not in TASKS:
        raise UserError(
            "Soft prompts are written as PEFT checkpoints for causal language models, base models and classifiers "
            f"with a trained head alone, not for {kind}."
        )
    state = model.state_dict(keep_vars=True)
    below = tuple(f"{module}." for module in modules)
    for name in [n for n in state if n.startswith(below) and ".tw_" not in n]:
        tensors[BASE + name] = trained.get(name, state[name])
    more = {"modules_to_save": modules} if modules else {}
    return write_files(directory, {**options, **facts, **more}, tensors)


def _acts(handle: Handle, part: Delta) -> bool:
    """Whether a part does more than train parameters that the model has."""
    if part.slot == "head":
        return any(t.part is part and t.meta for _, _, t in handle.sites)
    return bool(set(forms(part)) - {"existing"})


@torch.no_grad()
def _written(handle: Handle, part: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, options) of the prompt itself."""
    if isinstance(part, Prefix):
        matrix, options = prefix_matrix(handle)
        return {VECTORS: matrix}, {"peft_type": "PREFIX_TUNING", **options}
    t: Any = next(t for _, _, t in handle.sites if t.part is part)
    config: Any = handle.model.config
    options = {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": part.tokens,
        "num_transformer_submodules": 1,
        "num_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
    }
    if isinstance(part, EncodedPrompt):
        prompt = part.made(t)
        options |= {
            "peft_type": "P_TUNING",
            "encoder_reparameterization_type": part.network.upper(),
            "encoder_hidden_size": part.hidden or prompt.shape[1],
            "encoder_num_layers": part.layers if part.network == "lstm" else 2,
            "encoder_dropout": part.dropout,
        }
    else:
        prompt = t.P
        options["prompt_tuning_init"] = "RANDOM"
    tensors = {VECTORS: prompt}
    if isinstance(part, MultitaskPrompt):
        tensors |= {COLUMNS: t.U, ROWS: t.V}
        options |= {
            "peft_type": "MULTITASK_PROMPT_TUNING",
            "num_tasks": part.tasks,
            "num_ranks": part.rank,
        }
    return tensors, options | {"token_dim": prompt.shape[1]}


def read_prompt(
    model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], folder: Path, name: str
) -> Handle:
    """The prompt or prefix and the head beside it, attached. Raises `UserError` for what does not fit."""
    for option, value in config.items():
        if option not in _FREE and value not in (None, False) and value not in ([], {}, "", "none"):
            raise UserError(f"{folder / CONFIG} uses {option}={value!r}, which Tunewise cannot read.")
    task = config.get("task_type")
    if task not in TASKS or (config.get("num_transformer_submodules") or 1) != 1:
        raise UserError(
            f"{folder / CONFIG}: prompts are read for task_type {', '.join(TASKS)} of one stack, not {task!r}."
        )
    own = {VECTORS, COLUMNS, ROWS} if config["peft_type"] == "MULTITASK_PROMPT_TUNING" else {VECTORS}
    if missing := own - set(tensors):
        raise UserError(f"{folder / WEIGHTS} lacks {sorted(missing)[0]}.")
    trained = _trained(model, {n: v for n, v in tensors.items() if n not in own}, folder / WEIGHTS)
    parts, values = _parts(model, config, tensors, str(folder / WEIGHTS))
    head, rest = trained_parts(model, set(trained))
    handle = attach(model, Recipe(delta=[*parts, *rest], head=head, name="peft"), name=name, seed=0)
    with torch.no_grad():
        for _, site, t in handle.sites:
            for key, value in values.get(site.name, {}).items() if t.part is handle.deltas[0][1] else ():
                t.get_parameter(key).copy_(value)
        for key, value in trained.items():
            handle.existing[key].ours.copy_(value)
    return handle


def _trained(model: nn.Module, tensors: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The model's own parameters among the tensors, by their names."""
    found: dict[str, Tensor] = {}
    state, own = model.state_dict(keep_vars=True), dict(model.named_parameters())
    for key, value in tensors.items():
        short = key.removeprefix(BASE).replace(".modules_to_save.", ".")
        if not key.startswith(BASE) or short not in state:
            raise UserError(f"{file} holds {key}, which this model lacks{did_you_mean(short, state)}")
        if state[short].shape != value.shape:
            raise UserError(
                f"{file}: {key} has the shape {tuple(value.shape)}, not {tuple(state[short].shape)}."
            )
        if short in own:
            found[short] = value
        elif not torch.equal(state[short].detach().to(value), value):
            raise UserError(f"{file} holds {key}, a frozen tensor that differs from this model's.")
    return found


def _parts(
    model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], where: str
) -> tuple[list[Delta], dict[str, dict[str, Tensor]]]:
    """(deltas, {site: {tensor: value}}) of a checkpoint; the first delta owns the tensors."""
    value = tensors[VECTORS]
    if config["peft_type"] == "PREFIX_TUNING":
        return prefix_parts(model, config, value, where)
    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
    tokens, width = config.get("num_virtual_tokens"), getattr(embedding, "embedding_dim", None)
    _fits(value, (tokens, width), VECTORS, where)
    keep = config.get("task_type") != "FEATURE_EXTRACTION"
    if config["peft_type"] != "MULTITASK_PROMPT_TUNING":
        return [SoftPrompt(tokens=len(value), keep=keep)], {"": {"P": value}}
    u, v = tensors[COLUMNS], tensors[ROWS]
    tasks, rank = config.get("num_tasks") or 1, config.get("num_ranks") or 1
    _fits(u, (tasks, tokens, rank), COLUMNS, where)
    _fits(v, (tasks, rank, width), ROWS, where)
    part = MultitaskPrompt(tokens=len(value), keep=keep, tasks=tasks, rank=rank)
    return [part], {"": {"P": value, "U": u, "V": v}}


def _fits(value: Tensor, shape: tuple[Any, ...], name: str, where: str) -> None:
    if tuple(value.shape) != shape:
        raise UserError(
            f"{where}: {name} has the shape {tuple(value.shape)}; its options and this model need {shape}."
        )
