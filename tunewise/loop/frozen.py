"""Which leading blocks of a model stay frozen under the attached adaptations, and a name for what they compute."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from tunewise.core.adaptation import handles
from tunewise.core.delta import SiteDelta, forms
from tunewise.core.forward import is_quantized
from tunewise.sites import find_sites

__all__ = ["Frozen", "find_frozen", "precision_mark", "row_keys", "weight_marks"]

# What a configuration says about the answer, not about the blocks.
ABOUT_ANSWERS = frozenset(
    ("architectures", "id2label", "label2id", "num_labels", "problem_type", "classifier_dropout", "use_cache")
    + ("transformers_version", "_name_or_path", "name_or_path", "finetuning_task", "return_dict")
)
RECORDED = ("output_hidden_states", "output_attentions", "output_router_logits")
CHANGES = frozenset(("input", "weight", "output", "product", "around"))


@dataclass(frozen=True)
class Frozen:
    """The frozen leading blocks, those whose output is needed (the last, tapped ones), and why there are no more.

    before  modules that begin before the first block; around: those of them that end after it began
    """

    blocks: tuple[nn.Module, ...] = ()
    needed: tuple[int, ...] = ()
    reason: str | None = None
    before: tuple[nn.Module, ...] = ()
    around: frozenset[nn.Module] = frozenset()


class _Trace:
    """When each module began and ended in one forward pass."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = {module: name for name, module in model.named_modules()}
        self.calls: list[nn.Module] = []
        self.begin: dict[nn.Module, int] = {}
        self.end: dict[nn.Module, int] = {}
        self.time = 0

    def run(self, inputs: dict[str, Tensor]) -> None:
        """One pass under hooks, which are gone afterwards."""
        hooks = []
        try:
            for module in self.model.modules():
                if not isinstance(module, SiteDelta):
                    hooks.append(module.register_forward_pre_hook(self._began))
                    hooks.append(module.register_forward_hook(self._ended))
            self.model(**inputs)
        finally:
            for hook in hooks:
                hook.remove()

    def _began(self, module: nn.Module, args: Any) -> None:
        self.time += 1
        self.calls.append(module)
        self.begin.setdefault(module, self.time)

    def _ended(self, module: nn.Module, args: Any, result: Any) -> None:
        self.time += 1
        self.end[module] = self.time

    def start(self, module: nn.Module) -> int:
        """When the module began; of one that is not called itself, the innermost called one around it."""
        name = self.names[module]
        while module not in self.begin:
            name = name.rpartition(".")[0]
            module = self.model.get_submodule(name)
        return self.begin[module]


def find_frozen(model: nn.Module, inputs: dict[str, Tensor]) -> Frozen:
    """The leading blocks that end before the first change begins; needs one forward pass on `inputs`, no values."""
    reason = _obstacle(model)
    if reason is not None:
        return Frozen(reason=reason)
    sites = [site for site in find_sites(model) if site.kind == "block"]
    blocks = [site.module for site in sites]
    if not blocks or len({site.stack for site in sites}) > 1:
        return Frozen(reason="The model is not one stack of blocks.")
    trace = _Trace(model)
    trace.run(inputs)
    if [module for module in trace.calls if module in set(blocks)] != blocks:
        return Frozen(reason="The model does not call its blocks once each, in order.")
    first, what = _first_change(model, blocks, trace)
    frozen = [block for block in blocks if trace.end[block] <= first]
    if not frozen:
        return Frozen(reason=f"{what}, so no block stays as it is.")
    before = [m for m, began in trace.begin.items() if began < trace.begin[blocks[0]]]
    below = [*before, *(m for block in frozen for m in block.modules())]
    hooked = [m for m in below if m._forward_hooks or m._forward_pre_hooks]
    if hooked:
        return Frozen(reason=f"{trace.names[hooked[0]] or 'The model'} has forward hooks of its own.")
    tapped = {m for _, t in _deltas(model) for m in t.taps}
    needed = tuple(i for i, block in enumerate(frozen) if block in tapped or block is frozen[-1])
    more = f"{what}." if len(frozen) < len(blocks) else None
    around = frozenset(m for m in before if trace.end[m] > trace.begin[blocks[0]])
    return Frozen(tuple(frozen), needed, more, tuple(before), around)


def _obstacle(model: nn.Module) -> str | None:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return "The model has no configuration that tells it from others."
    if getattr(config, "is_encoder_decoder", False):
        return "The model is an encoder-decoder."
    recorded = next((name for name in RECORDED if getattr(config, name, False)), None)
    if recorded:
        return f"The configuration asks for {recorded}, which every block has to give."
    for name, module in model.named_modules():
        if is_quantized(module):
            return f"{name} is quantized, and rounding may depend on the other rows of a batch."
        if "_hf_hook" in module.__dict__:
            return f"{name or 'The model'} is offloaded or spread over devices by accelerate."
        if module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule":
            return f"{name or 'The model'} is compiled."
    return None


def _deltas(model: nn.Module) -> list[tuple[Any, SiteDelta]]:
    active = [handle for handle in handles(model).values() if handle.active]
    return [(site, t) for handle in active for _, site, t in handle.sites]


def _first_change(model: nn.Module, blocks: Sequence[nn.Module], trace: _Trace) -> tuple[int, str]:
    """When the first change of the pass begins, and a clause that names it."""
    found = [(trace.time + 1, "nothing is changed")]
    for site, t in _deltas(model):
        given, part = set(forms(t.part)), type(t.part).__name__
        where = f"{part} changes {site.name or 'the whole pass'}"
        place = site.exit if site.exit is not None else site.module
        if "switch" in given:
            found.append((0, f"{part} acts on the model as a whole"))
        elif given & CHANGES:
            found += [(trace.start(m), where) for m in (place, site.entry or place)]
        elif "read" in given:  # it is added to what the module itself has computed
            found.append((trace.end[place] if place in trace.end else trace.start(place), where))
        for module in t.taps:
            inside = module not in blocks and trace.start(module) > trace.begin[blocks[0]]
            found += [(trace.start(module), f"{part} reads inside a block")] if inside else []
    for handle in handles(model).values():
        for name, trained in handle.existing.items() if handle.active else ():
            found += [(trace.start(module), f"{name} is trained") for module, _ in trained.places]
    return min(found)


def weight_marks(model: nn.Module, frozen: Frozen) -> tuple[bytes, ...]:
    """For each frozen block a digest of the configuration and of all weights that its output depends on."""
    config: Any = model.config
    said = {k: v for k, v in config.to_dict().items() if k not in ABOUT_ANSWERS}
    said["attention"] = getattr(config, "_attn_implementation", None)
    digest = hashlib.blake2b(json.dumps(said, sort_keys=True, default=str).encode(), digest_size=16)
    for module in frozen.before:  # what stands around the blocks has another name under another head
        _add(digest, module, "" if module in frozen.around else type(module).__qualname__)
    marks = []
    for block in frozen.blocks:
        for module in block.modules():
            if not isinstance(module, SiteDelta):
                _add(digest, module, type(module).__qualname__)
        marks.append(digest.digest())
    return tuple(marks)


def _add(digest: Any, module: nn.Module, kind: str) -> None:
    """A module's own tensors, by content: a model loaded twice is one, and a changed one is another."""
    digest.update(kind.encode())
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def precision_mark(device: torch.device) -> bytes:
    """What else rounds states: the device's kind, automatic casts, the libraries' versions."""
    kind = device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else ""
    return f"{_versions()} {kind} {cast}".encode()


@cache
def _versions() -> str:
    return f"{torch.__version__} {version('transformers')}"


def row_keys(inputs: dict[str, Tensor], padded: bool) -> list[bytes] | None:
    """A digest of each row without its padding; None where a batch is not made of such rows.

    padded  whether rows with padding are understood: that a row does not depend on it has been tried
    """
    mask = inputs.get("attention_mask")
    values = list(inputs.values())
    if not values or any(
        not isinstance(v, Tensor) or v.dim() < 1 or len(v) != len(values[0]) for v in values
    ):
        return None
    if mask is not None and (mask.dim() != 2 or not bool(mask.any(1).all()) or not (padded or mask.all())):
        return None
    kept = None if mask is None else mask.bool().cpu()
    plain = {name: inputs[name].cpu() for name in sorted(inputs) if name != "attention_mask"}
    keys = []
    for i in range(len(values[0])):
        digest = hashlib.blake2b(digest_size=16)
        if kept is not None:
            at = kept[i].nonzero()
            digest.update(_bytes(at - at[0]))
        for name, value in plain.items():
            along = kept is not None and value.shape[:2] == kept.shape
            row = value[i][kept[i]] if along and kept is not None else value[i]
            digest.update(f"{name} {row.dtype} {tuple(row.shape)}".encode())
            digest.update(_bytes(row))
        keys.append(digest.digest())
    return keys
