"""PEFT's checkpoints, both ways, for every method that both libraries have; PEFT itself need not be installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunewise.core.delta import Delta
from tunewise.core.errors import UserError, did_you_mean
from tunewise.core.handle import Handle, attach
from tunewise.core.merge import mergeable
from tunewise.core.recipe import Recipe
from tunewise.sites import find_sites

from .peft_files import CONFIG, PREFIX, WEIGHTS, parameters, read_files
from .peft_form import Entry, Form, groups
from .peft_forms import FORMS, form_of
from .peft_prompt import PROMPTS, holds_prompt, read_prompt, write_prompt
from .peft_trained import Adapter, trained_parameters, trained_parts, write_adapter

__all__ = ["read_peft", "trained_parameters", "write_peft"]

Sorted = tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, Tensor]]


def write_peft(handle: Handle, directory: str | Path, base_name: str | None = None) -> Path:
    """Writes an adaptation as PEFT's adapter_config.json and adapter_model.safetensors.

    LoRA (with any start), DoRA, LoHa, LoKr, VeRA, OFT, IA3, FourierFT, MiSS, SHiRA, norms; soft prompts, P-tuning,
    prefixes and multitask prompts of one stack. Trained heads and other trained parameters go through
    `modules_to_save`, biases through `bias`. PEFT keeps whole modules, and the biases of no, all adapted or all
    layers: untrained neighbours are written as they are, so that values agree exactly, and only what PEFT would train
    further can be more. DoRA's magnitudes get the name that PEFT and transformers' `load_adapter` both find,
    `lora_magnitude_vector.weight`; transformers drops them under the one that PEFT itself writes.
    base_name  written as base_model_name_or_path; otherwise the name that the model was loaded by
    Raises `UserError` for what PEFT cannot hold: narrowed fused rows, 3-D experts, other deltas, several kinds of
    deltas, a changed base model.
    """
    if handle.committed:
        raise UserError(
            f"PEFT cannot hold this adaptation: its start changed {next(iter(handle.committed))} of the base "
            "model; export to lora instead."
        )
    if holds_prompt(handle):
        return write_prompt(handle, directory, base_name)
    form = _form(handle)
    trained = trained_parameters(handle)
    if form is None:
        adapter, trained = _norms(handle, trained)
        return write_adapter(handle.model, adapter, trained, directory, base_name)
    entries: list[Entry] = [(site, t) for _, site, t in handle.sites if t.meta and _filled(form, t)]
    if not entries:
        raise UserError(f"The adaptation has {form.title} of rank 0 alone, so there is nothing to write.")
    tensors = form.write(entries)
    sites = list(dict.fromkeys(site.name for site, _ in entries))
    adapter = Adapter(form.kind, form.title, sites, tensors, form.options(entries), form.only)
    return write_adapter(handle.model, adapter, trained, directory, base_name)


def _filled(form: Form, t: Any) -> bool:
    """A start that shares out ranks leaves some layers alone."""
    return all(value.numel() for value in form.theirs(t).values())


def _form(handle: Handle) -> Form | None:
    """The one kind that holds all deltas; None when there is none of them."""
    first: Form | None = None
    for part in {id(t.part): t.part for _, _, t in handle.sites if t.meta}.values():
        found = form_of(part)
        if found is None:
            raise UserError(_refusal(part))
        if first is not None and found is not first:
            raise UserError(_refusal(part, beside=first.title))
        first = found
    return first


def _refusal(part: Delta, beside: str = "") -> str:
    name = type(part).__name__
    if part.slot == "head":
        return f"PEFT has no place for the new layer of {name}; use ClassHead() or keep the run."
    what = f"{name} cannot be written as a PEFT checkpoint{f' beside {beside}' if beside else ''}"
    if mergeable(part):
        return f"{what}; export to lora or hf instead."
    return f"{what}; keep the adaptation and load it with tw.restore."


def _norms(handle: Handle, trained: dict[str, Tensor]) -> tuple[Adapter, dict[str, Tensor]]:
    """Trained norms as PEFT's LN_TUNING, which keeps them whole, and the other trained parameters."""
    sites, own = find_sites(handle.model), parameters(handle.model)
    every = {s.name for s in sites if s.kind == "norm"}
    chosen = sorted({n.rpartition(".")[0] for n in trained} & every)
    if not chosen:
        raise UserError(
            "A PEFT checkpoint needs LoRA at one module at least, another of PEFT's adapters, or trained norms; "
            "export to hf instead."
        )
    rest = {n: v for n, v in trained.items() if n.rpartition(".")[0] not in chosen}
    blocks = tuple(f"{s.name}." for s in sites if s.kind == "block")
    for name in rest:
        if name.startswith(blocks):
            raise UserError(
                f"PEFT's LayerNorm tuning holds no other parameters of the blocks, and {name} is trained; "
                "export to hf instead."
            )
    tensors = {}
    for name in sorted(n for n in own if n.rpartition(".")[0] in chosen):
        module, _, last = name.rpartition(".")
        tensors[f"{PREFIX}{module}.ln_tuning_layers.{last}"] = trained.get(name, own[name])
    return Adapter("LN_TUNING", "LayerNorm tuning", chosen, tensors, {}), rest


def read_peft(model: nn.Module, directory: str | Path, name: str = "default") -> Handle:
    """Attaches a PEFT checkpoint: equal outputs to `PeftModel`'s. The kinds are those that `write_peft` lists.

    The tensors say which modules are adapted, so that lists, regular expressions, "all-linear",
    `layers_to_transform` and `exclude_modules` need no second reading; patterns of ranks must agree with them.
    Modules of equal options become one part; biases and modules to save become trained parameters.
    Raises `UserError` naming the option that has no equal here, or the tensor that does not fit.
    """
    config, tensors = read_files(directory)
    folder, kind = Path(directory), config.get("peft_type")
    if kind in PROMPTS:
        return read_prompt(model, config, tensors, folder, name)
    form = FORMS.get(str(kind))
    if form is None:
        known = ", ".join([*FORMS, *PROMPTS])
        raise UserError(
            f"{folder / CONFIG} holds peft_type={kind!r}; of PEFT's adapters {known} can be read."
        )
    form.check(config, folder / CONFIG)
    pairs, trained, roots = _sort(model, tensors, folder / WEIGHTS, form)
    if not pairs and (form.names or not trained):
        raise UserError(f"{folder / WEIGHTS} holds no {form.title} tensors.")
    everything = {s.name: s for s in find_sites(model) if s.kind in form.kinds}
    for site in pairs:
        if site not in everything:
            hint = did_you_mean(site, everything)
            raise UserError(f"{WEIGHTS} adapts {site}, which is no {' or '.join(form.kinds)} here{hint}")
    found = [
        (site, form.arguments(everything[site], pairs[site], config)) for site in everything if site in pairs
    ]
    head, rest = trained_parts(model, set(trained))
    handle = attach(model, Recipe(delta=groups(found) + rest, head=head, name="peft"), name=name, seed=0)
    try:
        _load(handle, form, pairs, trained, roots)
    except UserError:
        handle.detach()
        raise
    return handle


@torch.no_grad()
def _load(
    handle: Handle,
    form: Form,
    pairs: dict[str, dict[str, Tensor]],
    trained: dict[str, Tensor],
    roots: dict[str, Tensor],
) -> None:
    if set(handle.existing) != set(trained):
        wrong = sorted(set(handle.existing) ^ set(trained))[0]
        raise UserError(
            f"{WEIGHTS} trains a set of the model's own parameters that Tunewise cannot name ({wrong})."
        )
    form.load(handle, pairs, roots)
    for key, value in trained.items():
        handle.existing[key].ours.copy_(value)


def _sort(model: nn.Module, tensors: dict[str, Tensor], file: Path, form: Form) -> Sorted:
    """({module: {PEFT's name: value}}, {parameter: value}, {shared name: value}).

    Frozen tensors must equal the model's and are left out.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    trained: dict[str, Tensor] = {}
    own, state = dict(model.named_parameters()), model.state_dict(keep_vars=True)
    starts = {name.partition("_")[0] for name in form.names}
    for key, value in tensors.items():
        if key in form.roots:
            continue
        if not key.startswith(PREFIX):
            raise UserError(f"{file} holds {key}: its names must start with {PREFIX}")
        short = key.removeprefix(PREFIX)
        if (found := form.find(short)) and value.dim():
            pairs.setdefault(found[0], {})[found[1]] = value
            continue
        if any(f".{start}_" in short for start in starts):
            raise UserError(
                f"{file} holds {short}, a tensor of a variant of {form.title} that Tunewise cannot read."
            )
        if ".original_module." in short:
            continue  # bias="all" also writes PEFT's twin of a module to save, which is never called
        plain = short.replace(".modules_to_save.", ".").replace(".ln_tuning_layers.", ".")
        frozen = short.endswith(".base_layer.weight") or plain not in own
        name = plain.replace(".base_layer.", ".")
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
    return pairs, trained, {key: value for key, value in tensors.items() if key in form.roots}
