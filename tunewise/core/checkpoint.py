"""Checkpoints: any tree of tensors and plain values as JSON + safetensors, written whole or not at all; no
pickle.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import RunError, UserError

__all__ = ["FORMAT", "get_rng", "latest", "load_tree", "save_tree", "set_rng", "write_json", "write_text"]

FORMAT = 1


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Atomic: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    _sync(part)
    os.replace(part, path)


def write_json(path: Path, value: Any) -> None:
    """Atomic JSON; NaN and infinity become null, since JSON has none."""

    def clean(item: Any) -> Any:
        if isinstance(item, float) and not np.isfinite(item):
            return None
        if isinstance(item, dict):
            return {str(k): clean(v) for k, v in item.items()}
        return [clean(v) for v in item] if isinstance(item, (list, tuple)) else item

    write_text(path, json.dumps(clean(value), indent=1, ensure_ascii=False) + "\n")


def _encode(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        key = f"t{len(tensors)}"
        tensors[key] = value.detach().cpu().contiguous().clone()
        return {"~": "tensor", "key": key}
    if isinstance(value, dict):
        return {
            "~": "dict",
            "items": [
                [_encode(k, where, tensors), _encode(v, f"{where}.{k}", tensors)] for k, v in value.items()
            ],
        }
    if isinstance(value, (tuple, set, frozenset)):
        kind = "tuple" if isinstance(value, tuple) else "set"
        return {
            "~": kind,
            "items": [_encode(v, where, tensors) for v in (value if kind == "tuple" else sorted(value))],
        }
    if isinstance(value, list):
        return [_encode(v, where, tensors) for v in value]
    if isinstance(value, float) and not np.isfinite(value):
        return {"~": "float", "value": repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise UserError(
        f"The state {where} holds a {type(value).__name__}; only tensors and plain values can be saved."
    )


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    kind = value["~"]
    if kind == "tensor":
        return tensors[value["key"]]
    if kind == "dict":
        return {_decode(k, tensors): _decode(v, tensors) for k, v in value["items"]}
    if kind == "float":
        return float(value["value"])
    items = [_decode(v, tensors) for v in value["items"]]
    return tuple(items) if kind == "tuple" else set(items)


def save_tree(folder: Path, tree: dict[str, Any]) -> None:
    """Writes `tree` as `folder`; a kill at any moment leaves the old folder or none, never half of one."""
    tensors: dict[str, Tensor] = {}
    plain = {"format": FORMAT, "tree": _encode(tree, "state", tensors)}
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        save_file(tensors, part / "tensors.safetensors")
        (part / "state.json").write_text(json.dumps(plain), encoding="utf-8")
        _sync(part / "tensors.safetensors")
        _sync(part / "state.json")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        why = getattr(error, "strerror", None) or error
        raise RunError(f"{folder} cannot be written: {why}; the last good checkpoint is kept.") from None
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
        os.replace(part, folder)
        shutil.rmtree(old)
    else:
        os.replace(part, folder)
    _sync(folder.parent)


def load_tree(folder: Path) -> dict[str, Any]:
    """What `save_tree` wrote; raises `UserError` for another format version or a damaged folder."""
    try:
        plain = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "tensors.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} is no readable checkpoint: {error}.") from None
    if plain.get("format") != FORMAT:
        raise UserError(f"{folder} has checkpoint format {plain.get('format')}; this version reads {FORMAT}.")
    return _decode(plain["tree"], tensors)  # type: ignore[no-any-return]


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint `step-N` in a folder, or None."""
    found = (
        sorted(folder.glob("step-*"), key=lambda p: int(p.name.partition("-")[2])) if folder.is_dir() else []
    )
    return found[-1] if found else None


def get_rng() -> dict[str, Any]:
    """Every global random state that training touches."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": (version, list(words), gauss),
        "numpy": (str(name), torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng(state: dict[str, Any]) -> None:
    """Puts back what `get_rng` gave."""
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
