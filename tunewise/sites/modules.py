"""What holds for any model: where it computes, whether it is wrapped, tied and exchanged weights, what is saved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tunewise.core.errors import UserError

if TYPE_CHECKING:
    from .site import Site

__all__ = ["Tied", "device_of", "hide_from_saving", "refuse_wrapped", "swapped", "tie", "untie"]

Tied = list[tuple[nn.Module, nn.Parameter, bool | None]]


def device_of(module: nn.Module) -> torch.device:
    """Where the module computes: with accelerate's offload that is not where its (meta) parameters say."""
    found = next((p.device for p in module.parameters()), torch.device("cpu"))
    for inner in module.modules() if found.type == "meta" else ():
        hook: Any = getattr(inner, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if getattr(one, "execution_device", None) is not None:
                return torch.device(one.execution_device)
    return found


@contextmanager
def swapped(module: nn.Module, new: dict[str, Any]) -> Iterator[None]:
    """The module with other tensors in the place of its parameters."""
    saved = {name: module._parameters[name] for name in new}
    module._parameters.update(new)
    try:
        yield
    finally:
        module._parameters.update(saved)


def refuse_wrapped(model: nn.Module, sites: Sequence[Site]) -> None:
    """Raises `UserError` for a model that was wrapped or sharded before."""
    wrapper = type(model).__name__
    if wrapper in ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"):
        raise UserError(f"The model is wrapped in {wrapper}: attach to the plain model first, then wrap it.")
    for site in sites:
        for name, p in site.module.named_parameters(recurse=False):
            if type(p.data).__name__ == "DTensor" or type(p).__name__ == "DTensor":
                raise UserError(f"{site.name}.{name} is already sharded: attach first, then shard.")


def hide_from_saving(model: nn.Module) -> None:
    """Anyone's `save_pretrained` writes the base's tensors only."""
    hidden: list[str] = [k for k in model.state_dict(keep_vars=True) if ".tw_" in f".{k}"]
    ignored: Any = getattr(model, "_keys_to_ignore_on_save", None) or ()
    own = {k for k in ignored if ".tw_" not in f".{k}"}
    if hasattr(model, "save_pretrained") and (hidden or len(own) < len(ignored)):
        model.__dict__["_keys_to_ignore_on_save"] = own | set(hidden)


def untie(model: nn.Module, modules: Iterable[nn.Module]) -> Tied:
    """Gives each module whose weight others share a copy of its own; `tie` undoes it with what is returned."""
    found: Tied = []
    config: Any = getattr(model, "config", None)
    for module in modules:
        weight = module._parameters.get("weight")
        shared = any(m._parameters.get("weight") is weight for m in model.modules() if m is not module)
        if weight is not None and shared:
            copy: Tensor = weight.detach().clone()
            module._parameters["weight"] = nn.Parameter(copy, requires_grad=False)
            found.append((module, weight, getattr(config, "tie_word_embeddings", None)))
            if config is not None:
                config.tie_word_embeddings = False
    return found


def tie(model: nn.Module, tied: Tied) -> None:
    """Puts the shared weights back."""
    for module, weight, flag in reversed(tied):
        module._parameters["weight"] = weight
        if flag is not None:
            model.config.tie_word_embeddings = flag  # type: ignore[union-attr]
