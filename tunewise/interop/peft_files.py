"""PEFT's adapter_config.json and adapter_model.safetensors: files, names of modules, the base model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tunewise.core.checkpoint import write_json
from tunewise.core.errors import UserError

__all__ = [
    "CONFIG",
    "PREFIX",
    "WEIGHTS",
    "base_facts",
    "module_names",
    "number",
    "parameters",
    "pattern_value",
    "read_files",
    "target_modules",
    "write_files",
]

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The backbone's own parameters by every name that they have, adaptations left out."""
    found = model.named_parameters(remove_duplicate=False)
    return {n: p for n, p in found if ".tw_" not in f".{n}"}


def module_names(model: nn.Module) -> list[str]:
    """Every module of the backbone by every name that it has."""
    return [n for n, _ in model.named_modules(remove_duplicate=False) if n and ".tw_" not in f".{n}"]


def read_files(directory: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(options, tensors) of a PEFT checkpoint. Raises `UserError` for missing, damaged and pickled files."""
    folder = Path(directory)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is no PEFT checkpoint: {CONFIG} is missing.")
    if not (folder / WEIGHTS).is_file():
        if (folder / "adapter_model.bin").is_file():
            raise UserError(
                f"{folder} holds adapter_model.bin, a pickle that can run code when read: save it again with "
                "PEFT, which writes safetensors."
            )
        raise UserError(f"{folder} is no PEFT checkpoint: {WEIGHTS} is missing.")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{folder / CONFIG} is no readable JSON: {error}.") from None
    if not isinstance(config, dict):
        raise UserError(f"{folder / CONFIG} must hold the options of one adapter by name.")
    try:
        return config, load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise UserError(f"{folder / WEIGHTS} is damaged: {error}.") from None


def pattern_value(patterns: dict[str, Any], name: str, otherwise: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name, as PEFT looks it up."""
    return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), otherwise)


def target_modules(model: nn.Module, names: Iterable[str]) -> list[str] | str:
    """Full names where they are the end of no other, otherwise one regular expression for exactly these."""
    wanted = sorted(set(names))
    ends = tuple(f".{name}" for name in wanted)
    if any(name.endswith(ends) and name not in wanted for name in module_names(model)):
        return "|".join(re.escape(name) for name in wanted)
    return wanted


def write_files(directory: str | Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """Both files, each whole or not at all; the configuration comes last, so that it never stands alone."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{WEIGHTS}.part"
    save_file(
        {n: v.detach().cpu().contiguous().clone() for n, v in tensors.items()},
        part,
        metadata={"format": "pt"},
    )
    part.replace(folder / WEIGHTS)
    write_json(folder / CONFIG, config)
    return folder


def number(value: float) -> float | int:
    """Whole numbers as integers, as PEFT writes them."""
    return int(value) if float(value).is_integer() else value


def base_facts(model: nn.Module, base_name: str | None, modules: list[str]) -> dict[str, Any]:
    """The base model and PEFT's wrapper that the checkpoint is for; none where a wrapper would change it."""
    kind, own = type(model), getattr(model, "config", None)
    task, mapping = None, {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    if getattr(model, "main_input_name", None) == "input_ids" and own is not None:
        if kind.__name__.endswith(("ForCausalLM", "LMHeadModel")):
            task = "CAUSAL_LM"
        elif kind.__name__.endswith("ForConditionalGeneration") and getattr(own, "is_encoder_decoder", False):
            task = "SEQ_2_SEQ_LM"
        elif kind.__name__.endswith("ForSequenceClassification") and {"classifier", "score"} & set(modules):
            task = "SEQ_CLS"
    return {
        "base_model_name_or_path": base_name or getattr(own, "_name_or_path", None) or None,
        "task_type": task,
        "inference_mode": True,
        "auto_mapping": None if task else mapping,
    }
