"""L = l(f(E(x) + d), y), d the worst change of the embeddings within a ball, found by a few gradient steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from tunewise.core.errors import UserError
from tunewise.core.part import Part
from tunewise.core.run import Run
from tunewise.head.base import sequence_mask

__all__ = ["Adversarial", "perturbation"]


class Adversarial(Part):
    """L = weight sum_i l_i(f(E(x_i) + d_i)) / units, |d_i| <= radius, by projected gradient ascent (PGD).

    d `[lines, tokens, width]` starts at random on the ball ("l2": of all real tokens of a line together; "linf":
    within it) and takes `steps` steps of 1.5 radius / steps along the gradient ("linf": its sign), projected back.
    The search runs in evaluation mode and leaves no gradient at parameters; the loss itself runs in training mode.
    One step costs about one forward and one backward pass more, the loss another. Differs from the reference in
    that padding is never changed and not counted. Source: MVP, arXiv 2303.07320; PGD: arXiv 1706.06083.
    Raises `UserError` for models without token embeddings and tasks that score tokens.
    """

    slot: ClassVar[str] = "objective"
    needs: ClassVar[frozenset[str]] = frozenset({"backprop"})
    weight: Annotated[float, Field(ge=0)] = 1.0
    radius: PositiveFloat = 1.0
    steps: PositiveInt = 1
    norm: Literal["l2", "linf"] = "l2"

    def loss(self, run: Run, batch: Any, logits: Tensor, outputs: Any, units: float) -> Tensor:
        """The loss of the changed micro-batch, in float32."""
        total: Tensor = self._answer(run, batch, perturbation(self, run, batch)).sum()
        return total / units

    def _answer(self, run: Run, batch: Any, d: Tensor) -> Tensor:
        """Losses `[rows]` with changed embeddings."""
        with _shifted(run.model, d):
            outputs = Run.outputs(run, batch)  # not from states that were kept of the unchanged rows
            losses: Tensor = run.task.losses(run.read(batch, outputs), batch)
        return losses


def perturbation(part: Adversarial, run: Run, batch: Any) -> Tensor:
    """d `[lines, tokens, width]` of a batch, detached."""
    model: Any = run.model
    if "input_ids" not in batch.inputs or not hasattr(model, "get_input_embeddings"):
        raise UserError("Adversarial changes token embeddings, and this model reads none.")
    table: Any = model.get_input_embeddings()
    ids = batch.inputs["input_ids"]
    real = sequence_mask(batch.inputs, ids.shape, ids.device)[..., None]
    d = _start(part, run, real, table.weight.shape[1])
    modes = {module: module.training for module in run.model.modules()}
    run.model.eval()
    try:
        for _ in range(part.steps):
            d.requires_grad_(True)
            with torch.enable_grad():
                (g,) = torch.autograd.grad(part._answer(run, batch, d).sum(), d)
            d = _step(part, d.detach(), g * real)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return d


def _start(part: Adversarial, run: Run, real: Tensor, width: int) -> Tensor:
    """A random change of each line's real tokens, drawn line by line, so that padding changes no draw."""
    make = run.rng("adversarial")
    d = torch.zeros(*real.shape[:2], width)
    for line, mask in zip(d, real[..., 0].cpu(), strict=True):
        line[mask] = torch.rand(int(mask.sum()), width, generator=make) * 2 - 1
    if part.norm == "linf":
        return (d * part.radius).to(real.device)
    d = d.to(real.device)
    return d * (part.radius / _length(d))


def _step(part: Adversarial, d: Tensor, g: Tensor) -> Tensor:
    size = 1.5 * part.radius / part.steps
    if part.norm == "linf":
        return (d + size * g.sign()).clamp(-part.radius, part.radius)
    d = d + size * g / _length(g)
    return d * (part.radius / _length(d)).clamp(max=1.0)


def _length(d: Tensor) -> Tensor:
    return d.flatten(1).norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)[:, None, None]


class _Shift:
    """A hook on the embedding: its own tokens get d; other calls of the table stay as they are."""

    def __init__(self, d: Tensor) -> None:
        self.d = d

    def __call__(self, module: nn.Module, args: Any, found: Tensor) -> Tensor:
        return found + self.d.to(found.dtype) if found.shape == self.d.shape else found


@contextmanager
def _shifted(model: Any, d: Tensor) -> Iterator[None]:
    hook = model.get_input_embeddings().register_forward_hook(_Shift(d))
    try:
        yield
    finally:
        hook.remove()
