"""The language model's own output layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunewise.core.errors import UserError
from tunewise.core.forward import forward_of, is_quantized
from tunewise.loop.quiet import quiet

from .base import Head, sequence_mask, takes_positions

if TYPE_CHECKING:
    from tunewise.core.run import Run

__all__ = ["LMHead"]

FEW = 8
"""Tokens of a trial."""
_reads: WeakKeyDictionary[Run, bool] = WeakKeyDictionary()


class LMHead(Head):
    """logits = the language model's own output layer, `[rows, tokens, words]`; trains nothing by itself.

    Raises `UserError` for a model without an output layer over words.
    """

    auto: ClassVar[str] = "causal_lm"

    def setup(self, task: Any, tokenizer: Any, model: nn.Module) -> None:
        layer = getattr(model, "get_output_embeddings", lambda: None)()
        if layer is None:
            raise UserError(
                f"LMHead: {type(model).__name__} has no output layer over words; load it as a causal model."
            )
        task.position_ids = takes_positions(model)

    def states(self, run: Run, batch: Any) -> tuple[Tensor, nn.Linear] | None:
        """(h `[rows, tokens, width]`, the layer) with logits = layer(h), the logits themselves not computed.

        None where the layer is trained or changed, where somebody listens to it or to the model, or where logits
        are more than the layer's answer, which a few tokens of the first batch have told.
        """
        layer = _silent_layer(run)
        if layer is None or type(self).logits is not Head.logits:
            return None
        if run not in _reads:
            _reads[run] = _tried(run, batch, layer)
        if not _reads[run]:
            return None
        with _withheld(layer) as inputs:
            run.outputs(batch)
        return (inputs[0], layer) if len(inputs) == 1 else None


def _silent_layer(run: Run) -> nn.Linear | None:
    """The output layer, if it is frozen, plain, and heard by nobody."""
    model = run.model
    layer: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if type(layer) is not nn.Linear or is_quantized(layer):
        return None
    if layer.weight.requires_grad or (layer.bias is not None and layer.bias.requires_grad):
        return None
    changed = forward_of(layer)
    if (changed is not None and changed.plan) or run.handle.plain or run.signals.listening:
        return None
    for module in (model, layer):
        if module._forward_hooks or module._forward_pre_hooks or "_hf_hook" in module.__dict__:
            return None
        if module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule":
            return None
    return layer


class _Withheld:
    """Stands in for the forward of the output layer: notes its input, and answers with zeros that take no memory."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer, self.inputs = layer, list[Tensor]()

    def __call__(self, x: Tensor) -> Tensor:
        self.inputs.append(x)
        return x.new_zeros(()).expand(*x.shape[:-1], self.layer.out_features)


@contextmanager
def _withheld(layer: nn.Linear) -> Iterator[list[Tensor]]:
    """What the layer is given inside the block."""
    before: Callable[..., Any] | None = layer.__dict__.get("forward")
    held = _Withheld(layer)
    layer.__dict__["forward"] = held
    try:
        yield held.inputs
    finally:
        if before is None:
            del layer.__dict__["forward"]
        else:
            layer.__dict__["forward"] = before


def _tried(run: Run, batch: Any, layer: nn.Linear) -> bool:
    """Whether the model's logits are the layer's answer and nothing else, on a few tokens; leaves no trace."""
    mask = sequence_mask(batch.inputs, batch.inputs["input_ids"].shape, run.device)
    at = mask[0].nonzero()[:FEW, 0]
    few = {k: v[:1, at] if v.shape[:2] == mask.shape else v[:1] for k, v in batch.inputs.items()}
    with quiet(run.model):
        wanted = run.model(**few).logits
        with _withheld(layer) as inputs:
            run.model(**few)
        hidden = inputs[0][:, -wanted.shape[1] :] if len(inputs) == 1 else wanted  # soft prompts in front
        if hidden.shape != (*wanted.shape[:-1], layer.in_features):
            return False
        far = (F.linear(hidden, layer.weight, layer.bias).double() - wanted.double()).abs().amax()
        bound = 1e-5 if wanted.dtype in (torch.float32, torch.float64) else 1e-2
        return bool(far <= bound * wanted.double().abs().amax())
