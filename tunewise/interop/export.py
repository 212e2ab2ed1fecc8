"""An adaptation in another library's format: PEFT checkpoint, plain LoRA, merged Hugging Face folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunewise.core.adaptation import handles
from tunewise.core.checkpoint import FORMAT, write_json
from tunewise.core.delta import keeps_in_out
from tunewise.core.errors import UserError, did_you_mean
from tunewise.core.handle import Handle
from tunewise.core.merge import not_mergeable
from tunewise.post.algebra import to_lora, to_lora_from_components
from tunewise.post.fold import fold
from tunewise.sites import Site, find_sites

from .peft import write_peft
from .peft_files import parameters
from .peft_lora import Factor, write_lora

__all__ = ["export", "merge_to", "to_plain_lora"]

RANK = 16


def export(
    handle: Handle,
    to: str,
    directory: str | Path,
    tokenizer: Any = None,
    *,
    rank: int | None = None,
    base_name: str | None = None,
) -> dict[str, Any]:
    """Writes the adaptation as `to` and gives the facts that `export.json` keeps beside it.

    "peft"  a PEFT checkpoint of exactly this adaptation, where PEFT has its method; see `write_peft`
    "lora"  a PEFT checkpoint of plain LoRA for any mergeable change; see `to_plain_lora` for `rank`
    "hf"    the merged model as Hugging Face saves it; it loads without Tunewise
    "tunewise"  the adaptation for inference, loaded by `tw.restore`: what can be folded is constants; see `fold`
    The tokenizer is written beside it if given. The model in memory stays as it is.
    Raises `UserError` for another `to`, for a folder that is not empty, and for what the format cannot hold.
    """
    writers: dict[str, Callable[[Path], dict[str, Any]]] = {
        "peft": lambda folder: _peft(handle, folder, base_name),
        "lora": lambda folder: to_plain_lora(handle, folder, rank, base_name),
        "hf": lambda folder: _hugging_face(handle, folder),
        "tunewise": lambda folder: {"folded": fold(handle, folder), "relative_error": 0.0},
    }
    if to not in writers:
        raise UserError(f'There is no export format "{to}"{did_you_mean(to, writers)}')
    if rank is not None and to != "lora":
        raise UserError(f'A rank can be chosen for the export to "lora" alone, not to "{to}".')
    folder = Path(directory)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty: choose another folder for the export.")
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        facts = {"format": FORMAT, "to": to, "method": handle.recipe.name, **writers[to](part)}
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        write_json(part / "export.json", facts)
        if folder.exists():
            folder.rmdir()
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return facts


def merge_to(handle: Handle, directory: str | Path, tokenizer: Any = None) -> Path:
    """W + dW as a plain Hugging Face folder: the same as `export(handle, "hf", directory, tokenizer)`."""
    export(handle, "hf", directory, tokenizer)
    return Path(directory)


def _peft(handle: Handle, folder: Path, base_name: str | None) -> dict[str, Any]:
    write_peft(handle, folder, base_name)
    return {"relative_error": 0.0}


def _hugging_face(handle: Handle, folder: Path) -> dict[str, Any]:
    model: Any = handle.model
    if not hasattr(model, "save_pretrained"):
        raise UserError(f"{type(model).__name__} is no Hugging Face model; export to peft.")
    for _, part in handle.deltas:
        if part.slot == "head" and not part.existing(model) and type(part).__name__ != "LMHead":
            raise UserError(
                f"A plain Hugging Face folder has no place for {type(part).__name__}, which reads answers "
                f"outside the model; keep the run, or {_instead(handle)}."
            )
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with _merged(handle):
            model.save_pretrained(folder)
    finally:
        if bars:
            logging.enable_progress_bar()
    return {"class": type(model).__name__, "relative_error": 0.0}


def _instead(handle: Handle) -> str:
    if any(t.meta for _, _, t in handle.sites if t.part.slot == "head"):
        return "tune with ClassHead()"
    return "export to peft"


@contextmanager
def _merged(handle: Handle) -> Iterator[None]:
    """The merged model for the time of a `with` block; afterwards every adaptation is as it was before."""
    if any(h.merged is not None for h in handles(handle.model).values() if h is not handle):
        raise UserError("Another adaptation is merged into the model; unmerge it first.")
    if handle.merged is not None:
        yield
        return
    reason = not_mergeable(handle)
    if reason:
        raise UserError(reason)
    with _alone(handle):
        handle.merge()
        try:
            yield
        finally:
            handle.unmerge()


@contextmanager
def _alone(handle: Handle) -> Iterator[None]:
    """This adaptation active and no other, for the time of a `with` block."""
    everyone = [(h, h.active, h.share) for h in handles(handle.model).values()]
    handle.activate(only=True)
    try:
        yield
    finally:
        handle.deactivate()
        for other, active, share in everyone:
            other.weigh(share)
            if active:
                other.activate(only=False)


@torch.no_grad()
def to_plain_lora(
    handle: Handle, directory: str | Path, rank: int | None = None, base_name: str | None = None
) -> dict[str, Any]:
    """dW ~ B A at every changed linear and embedding: a PEFT LoRA checkpoint of any mergeable adaptation.

    Low-rank deltas are exact unless `rank` is smaller than theirs, and so are low-rank changes that were
    committed to the base; other changes are truncated by SVD to `rank` (default 16). Gives `relative_error` =
    |dW - B A| / |dW| over all matrices, and per module. Heads, norms and biases are written whole. Raises
    `UserError` for what is no change of weights, and for experts.
    """
    if handle.merged is not None:
        raise UserError(f'The adaptation "{handle.name}" is merged into the model; unmerge it first.')
    if rank is not None and rank < 1:
        raise UserError(f"The rank of an export to lora must be above 0, not {rank}.")
    changes, components, trained = _changes(handle)
    factors: dict[str, Factor] = {}
    errors: dict[str, float] = {}
    lost = total = 0.0
    for name, (site, change) in changes.items():
        norm = float(change.norm())
        if name in components:
            b, a, error = to_lora_from_components(components[name], rank)
        else:
            b, a, error = to_lora(change, rank or RANK)
        if not len(a):  # a low-rank delta of rank 0 changes nothing
            continue
        factors[name] = Factor(a, b, float(len(a)), site.kind == "embedding", site.transposed)
        errors[name] = error
        lost, total = lost + (error * norm) ** 2, total + norm**2
    write_lora(handle.model, factors, trained, directory, base_name=base_name)
    relative = (lost / total) ** 0.5 if total else 0.0
    ranks = {name: len(factor.a) for name, factor in factors.items()}
    return {"relative_error": relative, "rank": max(ranks.values()), "ranks": ranks, "errors": errors}


Changes = dict[str, tuple[Site, Tensor]]
Components = dict[str, list[tuple[Tensor, Tensor, float]]]


def _changes(handle: Handle) -> tuple[Changes, Components, dict[str, Tensor]]:
    """({module: (site, dW)}, factors where they make up all of dW, {parameter: new value} of the rest)."""
    for _, _, t in handle.sites:
        if t.part.slot == "head" and t.meta:
            name = type(t.part).__name__
            raise UserError(
                f"LoRA has no place for the new layer of {name}; use ClassHead() or keep the run."
            )
    if handle.existing and not handle.undo:
        raise UserError(
            "The base weights were trained in place without a copy (undo=False): dW is not known."
        )
    sites = {s.name: s for s in find_sites(handle.model) if s.kind not in ("attention", "mlp", "block")}
    names = {id(m): n for n, m in handle.model.named_modules()}
    changes: Changes = {}
    trained: dict[str, Tensor] = {}
    with _alone(handle):
        found = handle.materialize()
        own = parameters(handle.model)
    adapted = {site.name for _, site, _ in handle.sites}
    for key, change in found.items():
        owner, _, last = key.rpartition(".")
        if key in sites and sites[key].kind in ("linear", "embedding"):
            _put(changes, sites[key], change)
        elif key in sites:
            raise UserError(f"LoRA cannot hold a change of {key} ({sites[key].kind}); export to hf instead.")
        elif key not in handle.existing:  # a bias that a delta shifts
            trained[key] = own[key].detach() + change.to(own[key].dtype)
        elif owner in adapted and last != "weight":  # trained itself, and shifted by a delta as well
            trained[key] = handle.existing[key].original.detach() + change.to(own[key].dtype)
        else:
            _existing(handle, key, sites, names, changes, trained)
    written: dict[str, tuple[Tensor, Tensor] | None] = {}
    for name, (weight, original) in handle.commits().items():
        site = sites[name.removesuffix(".weight")]
        change = (weight.detach() - original).float()
        change = change.T if keeps_in_out(site) else change
        _put(changes, site, change)
        largest = max(float(w.detach().abs().max()) for w in (weight, original))
        written[site.name] = _low_rank(change, largest, weight.dtype)
    return changes, _components(handle, changes, written), trained


def _low_rank(change: Tensor, largest: float, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """(B, A) of a change that is of low rank but for the rounding of weights up to `largest`, else None."""
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    noise = torch.finfo(dtype).eps * largest * sum(n**0.5 for n in change.shape)
    rank = int((s > noise).sum())
    return (u[:, :rank] * s[:rank], v[:rank]) if rank <= len(s) // 2 else None


def _put(changes: Changes, site: Site, change: Tensor) -> None:
    before = changes.get(site.name)
    changes[site.name] = (site, change if before is None else before[1] + change)


def _existing(
    handle: Handle,
    key: str,
    sites: dict[str, Site],
    names: dict[int, str],
    changes: Changes,
    trained: dict[str, Tensor],
) -> None:
    """A trained matrix becomes LoRA at every place that holds it; heads and vectors are kept whole."""
    e = handle.existing[key]
    for module, parameter in e.places:
        owner = names[id(module)]
        site = sites.get(owner)
        matrix = parameter == "weight" and site is not None and site.kind in ("linear", "embedding")
        if matrix and e.tag != "head" and site is not None:
            change = (e.ours - e.original).detach().float()
            _put(changes, site, change.T if keeps_in_out(site) else change)
        else:
            trained[f"{owner}.{parameter}" if owner else parameter] = e.ours.detach()


def _components(
    handle: Handle, changes: Changes, written: dict[str, tuple[Tensor, Tensor] | None]
) -> Components:
    """The factors of every module that low-rank changes alone make up, scattered to all its rows."""
    found: Components = {name: [(*pair, 1.0)] for name, pair in written.items() if pair is not None}
    mixed = {name for name, pair in written.items() if pair is None}
    mixed |= {names.rpartition(".")[0] for names in handle.existing}
    for _, site, t in handle.sites:
        part: Any = t.part
        if site.name not in changes or "components" not in part.gives or not hasattr(part, "components"):
            mixed.add(site.name)
            continue
        b, a = part.components(t)
        if t.rows is not None:
            b = b.new_zeros(len(changes[site.name][1]), b.shape[1]).index_copy(0, t.rows, b)
        found.setdefault(site.name, []).append((b.detach(), a.detach(), 1.0))
    return {name: pairs for name, pairs in found.items() if name not in mixed}
