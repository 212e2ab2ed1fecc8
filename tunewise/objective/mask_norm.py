"""Regularisers of learnt masks: sum |R|_2, and gradients that would leave the frozen model's answers."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from tunewise.core.part import Part
from tunewise.core.run import Run

__all__ = ["GradientDropout", "MaskNorm"]


def _masks(run: Run) -> dict[str, torch.nn.Parameter]:
    return {n: i.tensor for n, i in run.tensors.active() if i.tag == "mask"}


class MaskNorm(Part):
    """L = weight sum over masks |R|_2. Source: R-AMT, arXiv 2307.15049."""

    slot: ClassVar[str] = "objective"
    weight: Annotated[float, Field(ge=0)] = 1e-4

    def loss(self, run: Run, batch: Any, logits: Tensor, outputs: Any, units: float) -> Tensor:
        """The penalty, shared among the micro-batches of the step by their units."""
        total = sum((R.norm() for R in _masks(run).values()), logits.new_zeros((), dtype=torch.float32))
        return total * (batch.units.sum() / units)


class GradientDropout(Part):
    """g <- (1 - weight) g + weight 1[P > U] g for masks, P = (1 + sign(g) (g + k) / (|g| + |k|)) / 2, U uniform.

    k is the gradient of the cross-entropy between the answers of the model and those that it gave at its start. It
    needs a backward pass of its own, which is made inside `loss` while the micro-batch's graph is there
    (`torch.autograd.grad` with the graph retained) and adds nothing to the loss; with the start's own forward pass, a
    step costs about twice as much. g is the gradient of all objectives together. Where g and k agree nothing is
    dropped, where k = 0 neither. A head that starts at random has no answers worth keeping: use weight 0 there.
    Source: R-AMT, arXiv 2307.15049.
    """

    slot: ClassVar[str] = "objective"
    stage: ClassVar[str] = "mask"
    needs: ClassVar[frozenset[str]] = frozenset({"backprop"})
    weight: Annotated[float, Field(ge=0, le=1)] = 1.0

    def prepare(self, run: Run) -> None:
        if self.weight:
            run.reference("start")

    def before_step(self, run: Run) -> None:
        self.__dict__["_away"] = {}

    def loss(self, run: Run, batch: Any, logits: Tensor, outputs: Any, units: float) -> Tensor:
        """0; leaves k."""
        masks = _masks(run)
        if masks and logits.requires_grad:
            term = -(self._start(run, batch).softmax(-1) * logits.float().log_softmax(-1)).sum(-1)
            labels = batch.labels
            if term.dim() == 2 and labels is not None and labels.dim() == 2:  # tokens: the supervised ones
                term = term[:, -labels.shape[1] : -1][labels[:, 1:] != -100]
            found = torch.autograd.grad(
                term.sum() / units, list(masks.values()), retain_graph=True, allow_unused=True
            )
            away: dict[str, Tensor] = self.__dict__.setdefault("_away", {})
            for name, k in zip(masks, found, strict=True):
                if k is not None:
                    away[name] = away[name] + k if name in away else k
        return logits.new_zeros((), dtype=torch.float32)

    @torch.no_grad()
    def _start(self, run: Run, batch: Any) -> Tensor:
        modes = {module: module.training for module in run.model.modules()}
        run.model.eval()
        try:
            with run.reference("start").active():
                return run.forward(batch)[0].float()
        finally:
            for module, mode in modes.items():
                module.training = mode

    def gradients(self, run: Run) -> None:
        away: dict[str, Tensor] = self.__dict__.pop("_away", {})
        for name, R in _masks(run).items():
            if R.grad is None or name not in away:
                continue
            make = run.rng("gradient_dropout")
            U = torch.rand(R.shape, generator=make).to(R.device)
            g = R.grad
            P = agreement(g, away[name].to(g.dtype))
            R.grad = (1.0 - self.weight) * g + self.weight * torch.where(P > U, g, 0.0)


def agreement(g: Tensor, k: Tensor) -> Tensor:
    """P = (1 + sign(g) (g + k) / (|g| + |k|)) / 2, element-wise: 1 where signs agree, 1/2 at equal opposition.

    Without the 1e-8 of the published code, which would drop half of every gradient that is smaller.
    """
    return 0.5 * (1.0 + g.sign() * (g + k) / (g.abs() + k.abs()).clamp(min=torch.finfo(g.dtype).tiny))
