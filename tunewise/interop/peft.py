"""LoRA and prompt tuning as PEFT keeps them, both ways; PEFT itself need not be installed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunewise.core.delta import Delta
from tunewise.core.errors import UserError, did_you_mean
from tunewise.core.handle import Handle, attach
from tunewise.core.merge import mergeable
from tunewise.core.recipe import Recipe
from tunewise.delta.existing import ExistingWeights
from tunewise.delta.lora import LoRA
from tunewise.delta.prompt import SoftPrompt
from tunewise.head import ClassHead
from tunewise.sites import Site, find_sites

from .peft_files import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    Factor,
    base_facts,
    check_options,
    pattern_value,
    read_files,
    write_files,
    write_lora,
)

__all__ = ["read_peft", "trained_parameters", "write_peft"]

_KEY = re.compile(r"(?P<site>.+)\.lora_(?P<embedding>embedding_)?(?P<which>[AB])(?(embedding)|\.weight)")
Pairs = dict[str, dict[str, Tensor]]


def write_peft(handle: Handle, directory: str | Path, base_name: str | None = None) -> Path:
    """Writes a LoRA adaptation or a soft prompt as PEFT's adapter_config.json and adapter_model.safetensors.

    Trained heads and other trained parameters go through `modules_to_save`, trained biases through `bias`.
    PEFT keeps whole modules, and the biases of no, all LoRA or all layers: untrained neighbours are written
    as they are, so that values agree exactly, and only what PEFT would train further can be more.
    base_name  written as base_model_name_or_path; otherwise the name that the model was loaded by
    Raises `UserError` for what PEFT cannot hold: narrowed fused rows, 3-D experts, other deltas, a changed
    base model.
    """
    if handle.committed:
        raise UserError(
            f"PEFT cannot hold this adaptation: its start changed {next(iter(handle.committed))} of the base "
            "model; export to lora instead."
        )
    parts = [part for _, part in handle.deltas]
    if any(type(p) is SoftPrompt for p in parts):
        return _write_prompt(handle, directory, base_name)
    loras = [p for p in parts if type(p) is LoRA]
    t: Any
    for _, site, t in handle.sites:
        if type(t.part) is not LoRA and t.meta:
            raise UserError(_refusal(t.part))
        if type(t.part) is LoRA:
            _check_site(site, t.rows)
    for option in ("dropout", "scaling"):
        values = {getattr(p, option) for p in loras}
        if len(values) > 1:
            raise UserError(f"PEFT keeps one {option} for all of LoRA, not {sorted(values)}.")
    factors: dict[str, Factor] = {}
    for _, site, t in handle.sites:
        if type(t.part) is not LoRA:
            continue
        if site.name in factors:
            raise UserError(
                f"PEFT keeps one LoRA per module, and {site.name} has two; export to lora instead."
            )
        rank = len(t.A)
        unit = rank if t.part.scaling == "rank" else rank**0.5
        alpha = t.part.alpha if rank == t.part.rank else t.part.s * unit
        factors[site.name] = Factor(t.A, t.B, alpha, site.kind == "embedding", site.transposed)
    facts: dict[str, Any] = {}
    if loras:
        facts = {"dropout": loras[0].dropout, "rslora": loras[0].scaling == "sqrt"}
    trained = trained_parameters(handle)
    return write_lora(handle.model, factors, trained, directory, base_name=base_name, **facts)


def trained_parameters(handle: Handle) -> dict[str, Tensor]:
    """The backbone's own parameters that the adaptation trains, by name. Raises `UserError` for tied ones."""
    for name, e in handle.existing.items():
        if len(e.places) > 1:
            raise UserError(f"PEFT cannot hold {name}: it is tied to another module; export to hf instead.")
    return {name: e.ours.detach() for name, e in handle.existing.items()}


def _refusal(part: Delta) -> str:
    name = type(part).__name__
    if part.slot == "head":
        return f"PEFT has no place for the new layer of {name}; use ClassHead() or keep the run."
    if mergeable(part):
        return f"{name} cannot be written as a PEFT checkpoint; export to lora or hf instead."
    return f"{name} cannot be written as a PEFT checkpoint; keep the adaptation and load it with tw.restore."


def _check_site(site: Site, rows: Tensor | None) -> None:
    if rows is not None:
        raise UserError(
            f"PEFT cannot hold LoRA on the rows {site.role} of the fused {site.name} alone; "
            "export to lora instead."
        )
    if site.kind not in ("linear", "embedding"):
        raise UserError(
            f"PEFT checkpoints of LoRA on {site.kind} are not written ({site.name}); export to hf."
        )


def _write_prompt(handle: Handle, directory: str | Path, base_name: str | None) -> Path:
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


def read_peft(model: nn.Module, directory: str | Path, name: str = "default") -> Handle:
    """Attaches a PEFT checkpoint (LoRA, or prompt tuning of a causal model): equal outputs to `PeftModel`'s.

    The tensors say which modules are adapted, so that lists, regular expressions, "all-linear",
    `layers_to_transform` and `exclude_modules` need no second reading; `rank_pattern` must agree with them.
    Modules of equal rank and alpha become one part; biases and modules to save become trained parameters.
    Raises `UserError` naming the option that has no equal here, or the tensor that does not fit.
    """
    config, tensors = read_files(directory)
    file = Path(directory) / CONFIG
    check_options(config, file, ("LORA", "PROMPT_TUNING"))
    if config["peft_type"] == "PROMPT_TUNING":
        return _read_prompt(model, config, tensors, Path(directory), name)
    pairs, trained = _sort(model, tensors, Path(directory) / WEIGHTS)
    if not pairs:
        raise UserError(f"{Path(directory) / WEIGHTS} holds no LoRA tensors.")
    everything = {s.name: s for s in find_sites(model) if s.kind in ("linear", "embedding")}
    groups: dict[tuple[int, float], list[str]] = {}
    for site in pairs:
        if site not in everything:
            hint = did_you_mean(site, everything)
            raise UserError(f"{WEIGHTS} adapts {site}, which is no linear or embedding here{hint}")
    for site in [s for s in everything if s in pairs]:
        groups.setdefault(_size(everything[site], pairs[site], config), []).append(site)
    scaling = "sqrt" if config.get("use_rslora") else "rank"
    dropout = float(config.get("lora_dropout") or 0.0)
    parts: list[Delta] = [
        LoRA(rank, alpha, dropout, scaling, [f"re:{re.escape(site)}" for site in sites])  # type: ignore[arg-type]
        for (rank, alpha), sites in groups.items()
    ]
    head, rest = _trained_parts(model, set(trained))
    handle = attach(model, Recipe(delta=parts + rest, head=head, name="peft"), name=name, seed=0)
    if set(handle.existing) != set(trained):
        wrong = sorted(set(handle.existing) ^ set(trained))[0]
        handle.detach()
        raise UserError(
            f"{WEIGHTS} trains a set of the model's own parameters that Tunewise cannot name ({wrong})."
        )
    with torch.no_grad():
        for _, place, t in handle.sites:
            if type(t.part) is LoRA:
                t.get_parameter("A").copy_(pairs[place.name]["A"])
                t.get_parameter("B").copy_(pairs[place.name]["B"])
        for key, value in trained.items():
            handle.existing[key].ours.copy_(value)
    return handle


def _size(site: Site, pair: dict[str, Tensor], config: dict[str, Any]) -> tuple[int, float]:
    for which in "AB":
        if which not in pair:
            raise UserError(f"{WEIGHTS} lacks lora_{which} of {site.name}.")
    rank = pattern_value(config.get("rank_pattern") or {}, site.name, config.get("r", 8))
    a, b = tuple(pair["A"].shape), tuple(pair["B"].shape)
    if (a, b) != ((rank, site.in_features), (site.out_features, rank)):
        raise UserError(
            f"{WEIGHTS}: LoRA at {site.name} has the shapes {a} and {b}; this model and rank {rank} need "
            f"{(rank, site.in_features)} and {(site.out_features, rank)}."
        )
    return rank, float(
        pattern_value(config.get("alpha_pattern") or {}, site.name, config.get("lora_alpha", 8))
    )


def _sort(model: nn.Module, tensors: dict[str, Tensor], file: Path) -> tuple[Pairs, dict[str, Tensor]]:
    """({module: {"A", "B"}}, {parameter: value}); frozen tensors must equal the model's and are left out."""
    pairs: Pairs = {}
    trained: dict[str, Tensor] = {}
    own, state = dict(model.named_parameters()), model.state_dict(keep_vars=True)
    for key, value in tensors.items():
        if not key.startswith(PREFIX):
            raise UserError(f"{file} holds {key}: its names must start with {PREFIX}")
        short = key.removeprefix(PREFIX)
        if found := _KEY.fullmatch(short):
            pairs.setdefault(found["site"], {})[found["which"]] = value
            continue
        if ".lora_" in short:
            raise UserError(f"{file} holds {short}, a tensor of a variant of LoRA that Tunewise cannot read.")
        if ".original_module." in short:
            continue  # bias="all" also writes PEFT's twin of a module to save, which is never called
        frozen = short.endswith(".base_layer.weight") or short.replace(".modules_to_save.", ".") not in own
        name = short.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        if name not in state:
            raise UserError(f"{file} holds {name}, which this model lacks{did_you_mean(name, state)}")
        if state[name].shape != value.shape:
            raise UserError(
                f"{file}: {name} has the shape {tuple(value.shape)}, not {tuple(state[name].shape)}."
            )
        if frozen and not short.endswith(".base_layer.bias"):
            if not torch.equal(state[name].detach().to(value), value):
                raise UserError(f"{file} holds {name}, a frozen tensor that differs from this model's.")
            continue
        if name in trained and not torch.equal(trained[name], value):
            raise UserError(f"{file} holds two different tensors for {name}.")
        trained[name] = value
    return pairs, trained


def _trained_parts(model: nn.Module, names: set[str]) -> tuple[ClassHead | None, list[Delta]]:
    """The head, if all of it is trained, and parts for the other parameters."""
    head = None
    if type(model).__name__.endswith("ForSequenceClassification"):
        heads = [h for h in (ClassHead(), ClassHead(pooler=False)) if set(h.existing(model)) <= names]
        head = heads[0] if heads else None
    left = names - set(head.existing(model) if head else ())
    if not left:
        return head, []
    known = {s.name for s in find_sites(model)}
    owners: dict[str, set[str]] = {}
    for name in left:
        owner, _, last = name.rpartition(".")
        if owner not in known:
            raise UserError(f"{WEIGHTS} trains {name}, and {owner} is no place that Tunewise can train.")
        owners.setdefault(owner, set()).add(last)
    parts: list[Delta] = []
    for which, wanted in (("bias", {"bias"}), ("weight", {"weight"}), ("all", None)):
        chosen = sorted(
            o for o, last in owners.items() if last == wanted or (wanted is None and len(last) > 1)
        )
        if chosen:
            parts.append(ExistingWeights([f"re:{re.escape(o)}" for o in chosen], which))  # type: ignore[arg-type]
    return head, parts


def _read_prompt(
    model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], folder: Path, name: str
) -> Handle:
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
