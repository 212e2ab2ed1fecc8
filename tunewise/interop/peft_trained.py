"""What PEFT keeps beside its adapters: modules to save, and biases."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tunewise.core.delta import Delta
from tunewise.core.errors import UserError
from tunewise.core.handle import Handle
from tunewise.delta.existing import ExistingWeights
from tunewise.head import ClassHead
from tunewise.sites import find_sites

from .peft_files import PREFIX, WEIGHTS, base_facts, module_names, parameters, target_modules, write_files

__all__ = ["Adapter", "split_trained", "trained_parameters", "trained_parts", "write_adapter"]


@dataclass(frozen=True)
class Adapter:
    """One checkpoint before the trained parameters join it: kind, adapted modules, tensors by full key, options.

    title  how the kind is called in sentences
    only   the value of PEFT's option `bias` for the biases of adapted modules; None where there is no such option
    """

    kind: str
    title: str
    sites: list[str]
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    only: str | None = None


def trained_parameters(handle: Handle) -> dict[str, Tensor]:
    """The backbone's own parameters that the adaptation trains, by name. Raises `UserError` for tied ones."""
    for name, e in handle.existing.items():
        if len(e.places) > 1:
            raise UserError(f"PEFT cannot hold {name}: it is tied to another module; export to hf instead.")
    return {name: e.ours.detach() for name, e in handle.existing.items()}


def write_adapter(
    model: nn.Module,
    adapter: Adapter,
    trained: dict[str, Tensor],
    directory: str | Path,
    base_name: str | None = None,
) -> Path:
    """The checkpoint of `adapter` and of the parameters `trained` by name.

    PEFT keeps whole modules, and the biases of no, all adapted or all layers: untrained neighbours are written as
    they are. Raises `UserError` for parameters that it cannot hold.
    """
    modules, biases = split_trained(model, trained, adapter.title, adapter.sites)
    if biases and adapter.only is None:
        raise UserError(
            f"PEFT keeps no biases beside {adapter.title}, and {biases[0]} is trained; export to hf instead."
        )
    tensors, sites = dict(adapter.tensors), set(adapter.sites)
    own, state = parameters(model), model.state_dict(keep_vars=True)
    below = tuple(f"{module}." for module in modules)
    for name in [n for n in state if n.startswith(below) and ".tw_" not in n]:
        tensors[PREFIX + name] = trained.get(name, state[name])
    near = [f"{site}.bias" for site in adapter.sites if f"{site}.bias" in own]
    mode = "none" if not biases else "only" if set(biases) <= set(near) else "all"
    wide = [n for n in own if "bias" in n and not n.startswith(below)]
    for name in {"none": [], "only": near, "all": wide}[mode]:
        place = name.rpartition(".")[0]
        key = f"{place}.base_layer.bias" if place in sites else name
        tensors[PREFIX + key] = trained.get(name, own[name])
    config = {
        "peft_type": adapter.kind,
        **base_facts(model, base_name, modules),
        **adapter.options,
        "target_modules": target_modules(model, adapter.sites),
        "modules_to_save": modules or None,
    }
    if adapter.only is not None:
        config["bias"] = adapter.only if mode == "only" else mode
    return write_files(directory, config, tensors)


def split_trained(
    model: nn.Module, names: Iterable[str], form: str, at: list[str]
) -> tuple[list[str], list[str]]:
    """(modules to save whole, biases to save) that together hold the parameters `names`.

    Raises `UserError` for parameters that `modules_to_save` and `bias` cannot hold beside the adapters `at`.
    """
    every, trained, sites = list(parameters(model)), set(names), at
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
                f"PEFT cannot hold {name}: it is trained beside {form} in one module; export to hf instead."
            )
        while True:
            parent = owner.rpartition(".")[0]
            inside = [n for n in every if n.startswith(f"{parent}.")] if parent else []
            if not inside or set(inside) - trained or any(s.startswith(f"{parent}.") for s in sites):
                break
            owner = parent
        modules.append(owner)
    found = sorted(set(modules))
    _check_modules(model, found, sites, form)
    return found, [b for b in biases if not any(b.startswith(f"{m}.") for m in found)]


def _check_modules(model: nn.Module, modules: list[str], sites: list[str], form: str) -> None:
    """PEFT matches `modules_to_save` by the end of a name, and puts no adapter below a segment of that name."""
    for module in modules:
        for name in module_names(model):
            if name.endswith(module) and name != module:
                raise UserError(
                    f"PEFT would save {name} together with {module}: it cannot tell the two apart."
                )
        for site in sites:
            if re.match(rf"(^|.*\.){module}($|\..*)", site):
                raise UserError(f"PEFT cannot hold {form} at {site} beside the trained {module}.")


def trained_parts(model: nn.Module, names: set[str]) -> tuple[ClassHead | None, list[Delta]]:
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
