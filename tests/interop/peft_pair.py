"""The same tensors in PEFT's model and in ours: the same logits and the same gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import tiny, tiny_batch
from tunewise.core.handle import Handle, attach

__all__ = ["agree", "theirs"]

peft = pytest.importorskip("peft")

TARGETS = {
    "bert": ["query", "value", "intermediate.dense"],
    "llama": ["q_proj", "v_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
}
SITES = {
    "bert": "query | value | up",
    "llama": "query | value | up | down",
    "gpt2": "query | key | value | up",
}


def theirs(name: str, config: Any, spread: float = 0.4) -> Any:
    """PEFT's model with random tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny(name), config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape) * spread)
    return model.eval()


def agree(
    name: str,
    method: Any,
    config: Any,
    where: Mapping[str, Callable[[Any], Tensor]],
    *,
    length: int = 8,
    shift: float = 0.0,
    **options: Any,
) -> Handle:
    """`where`: our tensor -> PEFT's parameter in its layer; ours is PEFT's plus `shift`. 1e-5 in logits and
    gradients.
    """
    other, model = theirs(name, config), tiny(name)
    handle = attach(model, method, **options)
    layers = {site.name: other.get_submodule(f"base_model.model.{site.name}") for _, site, _ in handle.sites}
    pairs: list[tuple[str, Tensor, Tensor]] = []
    for _, site, t in handle.sites:
        for own in [n for n, (_, _, trainable, _) in t.meta.items() if trainable]:
            pair = (f"{site.name}.{own}", t.get_parameter(own), where[own](layers[site.name]))
            pairs.append(pair)
            with torch.no_grad():
                pair[1].copy_(pair[2].reshape(pair[1].shape) + shift)
    trained = [p for p in other.parameters() if p.requires_grad]
    assert len(trained) == len(pairs), "PEFT trains other tensors"
    batch = tiny_batch(name, length=length)
    plain = tiny(name)(**batch).logits
    outputs = {which: one(**batch) for which, one in (("ours", model), ("PEFT's", other))}
    wanted = outputs["PEFT's"].logits
    moved = float((wanted - plain).abs().max())
    assert moved > 1e-5, "the adaptation does nothing"
    close(outputs["ours"].logits, wanted, min(1e-5, moved / 5), "logits")
    for one in outputs.values():
        one.loss.backward()
    for what, mine, their in pairs:
        assert mine.grad is not None and their.grad is not None, what
        found, grad = mine.grad, their.grad.reshape(mine.grad.shape)
        close(found, grad, 1e-5 * float(grad.abs().max()) + 1e-7, what)
    return handle


def close(found: Tensor, wanted: Tensor, allowed: float, what: str) -> None:
    """Fails when two tensors are further apart than `allowed`."""
    far = float((found - wanted).abs().max())
    assert far <= allowed, f"{what}: {far:.1e} apart, allowed {allowed:.1e}"
