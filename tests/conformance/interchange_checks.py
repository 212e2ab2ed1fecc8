"""Checks of what other libraries get: a PEFT checkpoint, and any change of weights as plain LoRA."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tunewise.core.errors import UserError
from tunewise.core.handle import Handle
from tunewise.interop.export import export
from tunewise.interop.peft import read_peft

from .support import Case, close, model_outputs, remarks

__all__ = ["check_export_lora", "check_peft"]

EXACT = 1e-5


def _written(handle: Handle, to: str, folder: Path) -> dict[str, Any] | None:
    """The facts of the export, or None when it was refused in words."""
    try:
        return export(handle, to, folder)
    except UserError as error:
        remarks["refused"] = str(error)
        assert not folder.exists(), "a refused export left files"
        return None


def _loaded(model: nn.Module, folder: Path) -> nn.Module:
    """The base with the checkpoint, by PEFT itself."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, folder).eval()  # type: ignore[arg-type, no-any-return]


def _like(found: Tensor, wanted: Tensor, what: str) -> None:
    """The same answer but for the rounding of other operations; PEFT also answers at a soft prompt's tokens."""
    close(found[:, -wanted.shape[1] :] if found.dim() == 3 else found, wanted, 5e-5, what)


def check_peft(case: Case, folder: Path) -> None:
    """A PEFT checkpoint is refused in words, or gives the answer again in PEFT and, read back, here.

    Decoders get padding on the left: where they classify behind a prompt, PEFT takes padding on the right for text.
    """
    model, handle = case.adapted()
    batch = case.batch(pad="left" if case.base == "llama" else "right")
    if _written(handle, "peft", folder / "out") is None:
        return
    wanted = model_outputs(model, batch)
    tasks = {"task_ids": torch.zeros(len(wanted), dtype=torch.long)}  # PEFT has no task of its own
    more = tasks if any(hasattr(p, "tasks") for p in case.parts["delta"]) else {}
    _like(model_outputs(_loaded(case.model(), folder / "out"), batch | more), wanted, "PEFT's answer")
    if any(t.meta for _, _, t in handle.sites if t.part.slot == "delta"):
        read_peft(again := case.model(), folder / "out")
        _like(model_outputs(again, batch), wanted, "the answer of what was read back")


def check_export_lora(case: Case, folder: Path) -> None:
    """As plain LoRA: refused in words, or exact, or as far off as it says."""
    model, handle = case.adapted()
    batch = case.batch()
    facts = _written(handle, "lora", folder / "out")
    if facts is None:
        return
    if facts["relative_error"] <= EXACT:
        _like(
            model_outputs(_loaded(case.model(), folder / "out"), batch),
            model_outputs(model, batch),
            "PEFT's answer",
        )
        return
    remarks["inexact"] = f"{facts['relative_error']:.2f}"
    factors, plain = load_file(folder / "out" / "adapter_model.safetensors"), case.model()
    handle.merge()
    lost = total = 0.0
    for name in facts["errors"]:
        module = model.get_submodule(name)
        change = (module.weight - plain.get_submodule(name).weight).detach().float()
        change = change.T if isinstance(module, nn.Embedding) else change
        lost += float((_product(factors, name) - change).square().sum())
        total += float(change.square().sum())
    off = (lost / total) ** 0.5
    assert abs(off - facts["relative_error"]) <= 1e-3, (
        f"says {facts['relative_error']:.4f}, is off by {off:.4f}"
    )


def _product(factors: dict[str, Tensor], name: str) -> Tensor:
    """B A of one module; exported factors hold the scale."""
    prefix = f"base_model.model.{name}.lora_"
    if f"{prefix}embedding_A" in factors:
        return factors[f"{prefix}embedding_B"] @ factors[f"{prefix}embedding_A"]
    return factors[f"{prefix}B.weight"] @ factors[f"{prefix}A.weight"]
