"""PEFT's adapter_config.json and adapter_model.safetensors: names, options and what they cannot hold."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
    "Factor",
    "base_facts",
    "check_options",
    "parameters",
    "pattern_value",
    "read_files",
    "split_trained",
    "target_modules",
    "write_files",
    "write_lora",
]

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."

# Where the checkpoint is from, how training started, and what the tensors themselves tell.
_FREE = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "modules_to_save",
    "num_attention_heads",
    "num_layers",
    "num_transformer_submodules",
    "num_virtual_tokens",
    "peft_type",
    "peft_version",
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "token_dim",
    "tokenizer_kwargs",
    "tokenizer_name_or_path",
    "use_rslora",
}
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Factor:
    """s B A at one module: A `[rank, in]`, B `[out, rank]`, s = alpha / rank (or / sqrt(rank))."""

    a: Tensor
    b: Tensor
    alpha: float
    embedding: bool = False
    transposed: bool = False

    def keys(self, name: str) -> dict[str, Tensor]:
        """The two tensors under PEFT's names."""
        if self.embedding:
            return {f"{PREFIX}{name}.lora_embedding_A": self.a, f"{PREFIX}{name}.lora_embedding_B": self.b}
        return {f"{PREFIX}{name}.lora_A.weight": self.a, f"{PREFIX}{name}.lora_B.weight": self.b}


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The backbone's own parameters by every name that they have, adaptations left out."""
    found = model.named_parameters(remove_duplicate=False)
    return {n: p for n, p in found if ".tw_" not in f".{n}"}


def _module_names(model: nn.Module) -> list[str]:
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


def check_options(config: dict[str, Any], file: Path, types: Sequence[str]) -> None:
    """Raises `UserError` for a kind of adapter or an option that has no equal here, by its name."""
    kind = config.get("peft_type")
    if kind not in types:
        raise UserError(
            f"{file} holds peft_type={kind!r}; of PEFT's adapters {' and '.join(types)} can be read."
        )
    start = config.get("init_lora_weights")
    if start not in _STARTS:
        raise UserError(
            f"{file} has init_lora_weights={start!r}, which changes the base weights as well: convert it "
            "with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...) first."
        )
    for name, value in config.items():
        if name in _FREE or name == "init_lora_weights" or value in (None, False) or value in ([], {}, ""):
            continue
        raise UserError(f"{file} uses {name}={value!r}, which Tunewise cannot read.")
    for key in [*(config.get("rank_pattern") or ()), *(config.get("alpha_pattern") or ())]:
        try:
            re.compile(key)
        except re.error as error:
            raise UserError(f"{file}: the pattern {key!r} is no regular expression: {error}.") from None


def pattern_value(patterns: dict[str, Any], name: str, otherwise: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name, as PEFT looks it up."""
    return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), otherwise)


def target_modules(model: nn.Module, names: Iterable[str]) -> list[str] | str:
    """Full names where they are the end of no other, otherwise one regular expression for exactly these."""
    wanted = sorted(set(names))
    ends = tuple(f".{name}" for name in wanted)
    if any(name.endswith(ends) and name not in wanted for name in _module_names(model)):
        return "|".join(re.escape(name) for name in wanted)
    return wanted


def split_trained(model: nn.Module, names: Iterable[str], lora: Iterable[str]) -> tuple[list[str], list[str]]:
    """(modules to save whole, biases to save) that together hold the parameters `names`.

    Raises `UserError` for parameters that `modules_to_save` and `bias` cannot hold beside LoRA at `lora`.
    """
    every, trained, sites = list(parameters(model)), set(names), list(lora)
    modules: list[str] = []
    biases: list[str] = []
    for name in sorted(trained):
        owner = name.rpartition(".")[0]
        whole = all(n in trained for n in every if n.startswith(f"{owner}."))
        apart = owner and not any(f"{site}.".startswith(f"{owner}.") for site in sites)
        if name.endswith("bias") and not (whole and apart):
            biases.append(name)
            continue
        if not apart:
            raise UserError(
                f"PEFT cannot hold {name}: it is trained beside LoRA in one module; export to hf instead."
            )
        while True:
            parent = owner.rpartition(".")[0]
            inside = [n for n in every if n.startswith(f"{parent}.")] if parent else []
            if not inside or set(inside) - trained or any(s.startswith(f"{parent}.") for s in sites):
                break
            owner = parent
        modules.append(owner)
    found = sorted(set(modules))
    _check_modules(model, found, sites)
    return found, [b for b in biases if not any(b.startswith(f"{m}.") for m in found)]


def _check_modules(model: nn.Module, modules: list[str], sites: list[str]) -> None:
    """PEFT matches `modules_to_save` by the end of a name, and puts no LoRA below a segment of that name."""
    for module in modules:
        for name in _module_names(model):
            if name.endswith(module) and name != module:
                raise UserError(
                    f"PEFT would save {name} together with {module}: it cannot tell the two apart."
                )
        for site in sites:
            if re.match(rf"(^|.*\.){module}($|\..*)", site):
                raise UserError(f"PEFT cannot hold LoRA at {site} beside the trained {module}.")


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


def write_lora(
    model: nn.Module,
    factors: dict[str, Factor],
    trained: dict[str, Tensor],
    directory: str | Path,
    *,
    dropout: float = 0.0,
    rslora: bool = False,
    base_name: str | None = None,
) -> Path:
    """A LoRA checkpoint of `factors` by module name and of the parameters `trained` by name."""
    if not factors:
        raise UserError("A PEFT checkpoint needs LoRA at one module at least; export to hf instead.")
    modules, biases = split_trained(model, trained, factors)
    tensors = {k: v for name, factor in factors.items() for k, v in factor.keys(name).items()}
    own, state = parameters(model), model.state_dict(keep_vars=True)
    below = tuple(f"{module}." for module in modules)
    for name in [n for n in state if n.startswith(below) and ".tw_" not in n]:
        tensors[PREFIX + name] = trained.get(name, state[name])
    near = [f"{site}.bias" for site in factors if f"{site}.bias" in own]
    mode = "none" if not biases else "lora_only" if set(biases) <= set(near) else "all"
    wide = [n for n in own if "bias" in n and not n.startswith(below)]
    for name in {"none": [], "lora_only": near, "all": wide}[mode]:
        place = name.rpartition(".")[0]
        key = f"{place}.base_layer.bias" if place in factors else name
        tensors[PREFIX + key] = trained.get(name, own[name])
    config = _config(model, factors, modules, base_name)
    config |= {"bias": mode, "lora_dropout": dropout, "use_rslora": rslora}
    return write_files(directory, config, tensors)


def _config(
    model: nn.Module, factors: dict[str, Factor], modules: list[str], base_name: str | None
) -> dict[str, Any]:
    ranks = {name: len(factor.a) for name, factor in factors.items()}
    alphas = {name: _number(factor.alpha) for name, factor in factors.items()}
    rank, alpha = (max(set(v := list(d.values())), key=v.count) for d in (ranks, alphas))
    return {
        "peft_type": "LORA",
        **base_facts(model, base_name, modules),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(n)}": r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(n)}": a for n, a in alphas.items() if a != alpha},
        "target_modules": target_modules(model, factors),
        "modules_to_save": modules or None,
        "fan_in_fan_out": any(f.transposed for f in factors.values()),
        "init_lora_weights": True,
    }


def _number(value: float) -> float | int:
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
