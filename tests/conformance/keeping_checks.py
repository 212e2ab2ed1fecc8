"""Checks of what can be done with an adaptation: merge, save, switch, copy, detach."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tunewise.core.adaptation import handles
from tunewise.core.delta import forms
from tunewise.core.forward import forward_of, is_quantized, read_weight
from tunewise.core.handle import restore

from .support import Case, close, close_as_rounded, gap, outputs, perturb, refused, same

__all__ = [
    "check_base_checkpoint",
    "check_deepcopy",
    "check_detach",
    "check_materialize",
    "check_merge",
    "check_pickle",
    "check_quantized",
    "check_save_restore",
    "check_two_adaptations",
]


def check_merge(case: Case) -> None:
    """Merged equals unmerged, unmerge restores bit by bit; what cannot be merged says so and stays."""
    model, handle = case.adapted()
    batch = case.batch()
    wanted, before = outputs(model, batch), _tensors(model)
    if not case.mergeable:
        with refused(f"merging {case.name}"):
            handle.merge()
        same(outputs(model, batch), wanted, "the answer after a refused merge")
        return
    handle.merge()
    assert not any((f := forward_of(m)) and f.plan for m in model.modules()), "a delta acts after merge"
    close_as_rounded(outputs(model, batch), wanted, model, batch, "merged and unmerged answers")
    handle.unmerge()
    same(outputs(model, batch), wanted, "the answer after unmerge")
    for name, value in _tensors(model).items():
        same(value, before[name], f"{name} after unmerge")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {n: v.detach().clone() for n, v in model.state_dict().items()}


def _pushed(module: nn.Module, ins: int, embedding: bool) -> tuple[Tensor, Tensor]:
    """(W' `[out, in]`, response to zero) by asking the attached module itself."""
    if embedding:
        table = module(torch.arange(ins))
        return table.T, torch.zeros(table.shape[1])
    zero = module(torch.zeros(1, ins))[0]
    return (module(torch.eye(ins)) - zero).T, zero


@torch.no_grad()
def check_materialize(case: Case) -> None:
    """W' - W agrees with an identity pushed through the attached layers, and a plain copy takes it."""
    plain, (model, handle) = case.model(), case.adapted()
    changes = handle.materialize()
    for site in {
        s for _, s, t in handle.sites if s.kind in ("linear", "embedding") and t.part.slot == "delta"
    }:
        assert site.in_features is not None
        weight, zero = _pushed(site.module, site.in_features, site.kind == "embedding")
        old, _ = _pushed(plain.get_submodule(site.name), site.in_features, site.kind == "embedding")
        wanted = weight - old
        trained = changes.get(f"{site.name}.weight", torch.zeros(()))  # a part of the base itself
        error = float((changes.get(site.name, 0.0) + trained - wanted).abs().max())
        allowed = 1e-5 * float(weight.abs().max())
        assert error <= allowed, f"materialize({site.name}) is {error:.1e} off the pushed identity"
        bias = getattr(plain.get_submodule(site.name), "bias", None)
        if isinstance(bias, Tensor) and f"{site.name}.bias" in changes:
            close(bias + changes[f"{site.name}.bias"], zero, 1e-5, f"the bias of {site.name}")
    _give(plain, changes)
    if any(p.slot == "head" and "existing" not in forms(p) for _, p in handle.deltas):
        return  # a head of its own reads the answer: the plain copy has none
    batch = case.batch()
    close_as_rounded(outputs(model, batch), outputs(plain, batch), plain, batch, "a plain copy with W + dW")


def _give(plain: nn.Module, changes: dict[str, Tensor]) -> None:
    """W <- W + dW by hand in a model without any adaptation; tied tables are separated first."""
    params = dict(plain.named_parameters(remove_duplicate=False))
    for name, change in changes.items():
        key = name if name in params else f"{name}.weight"
        owner = plain.get_submodule(key.rpartition(".")[0])
        is_site, last = name not in params, key.rpartition(".")[2]
        old = params[key]
        turned = change.T if is_site and isinstance(owner, nn.Embedding) else change
        if is_site:
            owner._parameters[last] = nn.Parameter(old + turned.to(old.dtype))
        else:
            old.add_(turned.to(old.dtype))


def check_save_restore(case: Case, folder: Path) -> None:
    """Saved and restored on a fresh base: bit-equal answers and the same names, whatever the random state."""
    model, handle = case.adapted()
    wanted = outputs(model, case.batch())
    handle.save(folder)
    written = {p.suffix for p in folder.iterdir()}
    assert written == {".json", ".safetensors"}, f"files of other kinds were written: {written}"
    torch.manual_seed(99)
    other = case.model()
    again = restore(other, folder)
    assert list(again.tensors()) == list(handle.tensors()), "names of the restored tensors"
    same(outputs(other, case.batch()), wanted, "the restored answer")


def check_two_adaptations(case: Case) -> None:
    """a, b and none on one base: each answers exactly as if it were alone."""
    batch, model = case.batch(), case.model()
    wanted = {s: outputs(case.adapted(s)[0], batch) for s in (1, 2)}
    none = outputs(model, batch)
    first = case.attach(model, seed=1, name="first")
    second = case.attach(model, seed=2, name="second")
    for _ in range(2):
        first.activate()
        same(outputs(model, batch), wanted[1], "the first of two adaptations")
        second.activate()
        same(outputs(model, batch), wanted[2], "the second of two adaptations")
    second.deactivate()
    same(outputs_plain(model, batch), outputs_plain(case.model(), batch), "the base with both switched off")
    first.detach()
    second.activate()
    same(outputs(model, batch), wanted[2], "the second after the first was detached")
    second.detach()
    same(outputs(model, batch), none, "the base after both were detached")


def outputs_plain(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The model's own answer, whatever heads it has beside it."""
    with torch.no_grad():
        found = model(**batch)
    return found.logits if "logits" in found else found.last_hidden_state  # type: ignore[no-any-return]


def check_deepcopy(case: Case) -> None:
    """A copy answers the same, and neither feels what happens to the other."""
    model, _ = case.adapted()
    batch = case.batch()
    wanted = outputs(model, batch)
    twin = copy.deepcopy(model)
    same(outputs(twin, batch), wanted, "the answer of a deep copy")
    theirs = handles(twin)["default"]
    perturb(theirs, 8)
    assert gap(outputs(twin, batch), wanted) > 1e-6, "the copy does not answer to its own tensors"
    same(outputs(model, batch), wanted, "the original after its copy was changed")
    theirs.detach()
    same(outputs(model, batch), wanted, "the original after its copy was detached")
    same(outputs(twin, batch), outputs(case.model(), batch), "the copy after detach")


def check_pickle(case: Case) -> None:
    """An adapted model survives pickling and `torch.save`, as a user's own tools may do it.

    Before it has answered: transformers cannot pickle any model that was once asked for its hidden states.
    """
    model, _ = case.adapted()
    pickled, stream = pickle.dumps(model), io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    wanted = outputs(model, case.batch())
    same(outputs(pickle.loads(pickled), case.batch()), wanted, "the answer after pickling")
    same(outputs(torch.load(stream, weights_only=False), case.batch()), wanted, "the answer after torch.save")


def _face(model: nn.Module) -> dict[str, Any]:
    """Everything about a base that an adaptation must give back."""
    config: Any = getattr(model, "config", None)
    return {
        "flags": {n: p.requires_grad for n, p in model.named_parameters()},
        "classes": {n: type(m) for n, m in model.named_modules()},
        "own": {n: sorted({"forward", "_old_forward"} & set(vars(m))) for n, m in model.named_modules()},
        "identity": {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)},
        "config": config.to_dict() if config is not None else None,
        "attention": getattr(config, "_attn_implementation", None),
        "ignored": getattr(model, "_keys_to_ignore_on_save", None),
    }


def check_detach(case: Case) -> None:
    """Attach, train and detach: tensors bit-equal, and names, classes, flags and configuration as before."""
    model, batch = case.model(), case.batch()
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 3 > 0)
    before, tensors, wanted = _face(model), _tensors(model), outputs(model, batch)
    handle = case.attach(model)
    classes = {n: type(m) for n, m in model.named_modules() if n in before["classes"]}
    assert classes == before["classes"], "attaching renamed or reclassed a module of the base"
    outputs(model, batch, grad=True).float().square().sum().backward()
    torch.optim.SGD(handle.parameters(), 1e-3).step()
    handle.detach()
    for key, value in _face(model).items():
        assert value == before[key], f"{key} are not what they were before attaching"
    after = _tensors(model)
    assert list(after) == list(tensors), "the keys of the state dict changed"
    for name, value in after.items():
        same(value, tensors[name], f"{name} after detach")
    same(outputs(model, batch), wanted, "the answer after detach")


def _saved(model: Any, folder: Path) -> tuple[set[str], dict[str, Any]]:
    model.save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
    return names, json.loads((folder / "config.json").read_text())


def check_base_checkpoint(case: Case, folder: Path) -> None:
    """A base checkpoint loads with `strict=True`, a lacking key is still refused; saving writes base keys."""
    plain, (model, handle) = case.model(), case.adapted()
    wanted, checkpoint = outputs(model, case.batch()), plain.state_dict()
    names, config = _saved(plain, folder / "plain")
    found, their_config = _saved(model, folder / "adapted")
    assert found == names, f"save_pretrained wrote other keys: {sorted(found ^ names)[:3]}"
    assert their_config == config, "save_pretrained wrote another configuration"
    model.load_state_dict(checkpoint, strict=True)
    if not handle.existing:
        same(outputs(model, case.batch()), wanted, "the answer after the base was loaded anew")
    lacking = dict(checkpoint)
    del lacking[next(iter(lacking))]
    try:
        model.load_state_dict(lacking, strict=True)
    except RuntimeError:
        return
    raise AssertionError("a checkpoint that lacks a key of the base was accepted")


class Rounded(Tensor):
    """A weight as torchao keeps it, for checks without torchao: read through `dequantize`."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def dequantize(self) -> Tensor:  # type: ignore[override]
        return self.as_subclass(Tensor)


Rounded.__module__ = "torchao.stand_in"


def quantize(model: nn.Module, real: bool) -> None:
    """Linear weights of the blocks become 8-bit: torchao's, or its stand-in with the same rounding idea."""
    if real:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_  # type: ignore[import-not-found]

        # not the output layer, whose weight the embedding may share
        quantize_(
            model, Int8WeightOnlyConfig(), lambda m, name: isinstance(m, nn.Linear) and ".layer" in name
        )
        return
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layer" in name:
            step = module.weight.detach().abs().amax(1, keepdim=True) / 127
            rounded = (module.weight.detach() / step).round() * step
            module._parameters["weight"] = Tensor._make_subclass(Rounded, rounded, False)


def check_quantized(case: Case, real: bool) -> None:
    """On an 8-bit base: refused in words, or the answers of the dequantized base, with merging refused."""
    model, twin = case.model(), case.model()
    quantize(model, real)
    for name, module in twin.named_modules():
        if isinstance(module, nn.Linear):
            module.weight.data = read_weight(model.get_submodule(name)).detach().clone()
    codes = {n for n, m in model.named_modules() if is_quantized(m)}
    there = case.attach(twin)
    written = {n.removesuffix(".weight") for n in (*there.existing, *there.committed)}
    if codes & written:
        with refused(f"{case.name} on a quantized base", ["quantized"]):
            case.attach_or_raise(model)
        return
    handle = case.attach(model)
    batch = case.batch()
    wanted = outputs(twin, batch)
    close_as_rounded(outputs(model, batch), wanted, twin, batch, "the answer on a quantized base")
    if case.mergeable and handle.sites:
        with refused(f"merging {case.name} into a quantized base", ["quantized"], whole=False):
            handle.merge()
