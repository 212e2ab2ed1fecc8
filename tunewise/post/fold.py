"""The same answers from constants: networks that only make prompts in training stay behind."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tunewise.core.checkpoint import FORMAT, write_json
from tunewise.core.delta import Delta
from tunewise.core.errors import UserError
from tunewise.core.handle import Handle
from tunewise.core.recipe import Recipe
from tunewise.sites import Site

__all__ = ["fold", "folds"]


def folds(part: Any) -> bool:
    """Whether the part has a form for inference: `folded(entries, model)` -> (delta, {site: {tensor: value}}).

    entries  its (site, tensors) pairs; every tensor of the other delta must be given.
    """
    return hasattr(part, "folded")


@torch.no_grad()
def fold(handle: Handle, directory: str | Path) -> list[str]:
    """Writes the adaptation with its folding parts as constants, to be loaded by `tw.restore`; gives their names.

    P-tuning's and prefix tuning's networks become the prompts that they make, deep prompts the keys and values that
    the blocks make of them (under all other changes of this adaptation, which must stay with them). All other parts
    are written as they are. Raises `UserError` for a merged or changed base.
    """
    if handle.merged is not None or handle.committed:
        raise UserError(f'The adaptation "{handle.name}" has changed the base: it cannot be written folded.')
    entries = _entries(handle)
    made = {key: _alone(handle, part, entries[key]) for key, part in handle.deltas if folds(part)}
    old = {key: part for key, part in handle.deltas}
    recipe = _recipe(handle.recipe, {id(old[key]): new for key, (new, _) in made.items()})
    names = [key for key, _ in Handle(handle.model, recipe, "folding", handle.dtype, True, True).deltas]
    state: dict[str, Tensor] = {}
    tags: dict[str, str] = {}
    sites: dict[str, str] = {}
    for key, new in zip(old, names, strict=True):
        if key in made:
            for site, tensors in made[key][1].items():
                begin = f"{site}.{new}" if site else new
                state |= {f"{begin}.{name}": value.float() for name, value in tensors.items()}
                tags |= {f"{begin}.{name}": "prompt" for name in tensors}
                sites[site] = new
        else:
            kept = _renamed(handle, key, new)
            state |= {name: value for name, (value, _) in kept.items()}
            tags |= {name: tag for name, (_, tag) in kept.items() if tag}
            sites |= {site.name: new for site, _ in entries[key]}
    _write(handle, Path(directory), recipe, state, {"sites": sites, "tags": tags})
    return [type(old[key]).__name__ for key in made]


def _alone(handle: Handle, part: Any, entries: list[tuple[Site, Any]]) -> tuple[Delta, Any]:
    """Constants as they are in inference: no dropout."""
    modes = {module: module.training for module in handle.model.modules()}
    handle.model.eval()
    try:
        return part.folded(entries, handle.model)  # type: ignore[no-any-return]
    finally:
        for module, mode in modes.items():
            module.training = mode


def _entries(handle: Handle) -> dict[str, list[tuple[Site, Any]]]:
    found: dict[str, list[tuple[Site, Any]]] = {key: [] for key, _ in handle.deltas}
    for key, site, t in handle.sites:
        found[key].append((site, t))
    return found


def _recipe(recipe: Recipe, new: dict[int, Delta]) -> Recipe:
    """The recipe with other deltas in the places of these."""
    found = copy.copy(recipe)
    found.essential = {s: [new.get(id(p), p) for p in ps] for s, ps in recipe.essential.items()}  # type: ignore[misc]
    found.default = {s: [new.get(id(p), p) for p in ps] for s, ps in recipe.default.items()}  # type: ignore[misc]
    return found


def _renamed(handle: Handle, key: str, new: str) -> dict[str, tuple[Tensor, str | None]]:
    """What a part keeps, under the key that it has beside the folded ones."""
    infos = handle.tensors()
    found: dict[str, tuple[Tensor, str | None]] = {}
    for name, value in handle.state().items():
        if name in handle.existing:
            if handle.existing[name].owner == key:
                found[name] = value, infos[name].tag
            continue
        owner, _, last = name.rpartition(".")
        front, _, mine = owner.rpartition(".")
        if mine == key:
            begin = f"{front}.{new}" if front else new
            found[f"{begin}.{last}"] = value, infos[name].tag if name in infos else None
    return found


def _write(
    handle: Handle, folder: Path, recipe: Recipe, state: dict[str, Tensor], more: dict[str, Any]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / ".adaptation.safetensors.part"
    save_file(
        {n: v.detach().cpu().contiguous().clone() for n, v in state.items()}, part, metadata={"format": "pt"}
    )
    part.replace(folder / "adaptation.safetensors")
    facts = {"format": FORMAT, "name": handle.name, "recipe": recipe.describe()}
    write_json(folder / "adaptation.json", facts | {"dtype": str(handle.dtype).removeprefix("torch.")} | more)
