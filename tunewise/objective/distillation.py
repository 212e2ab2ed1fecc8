"""L = weight * mean (z - z_T)^2: the answers of an earlier adaptation on the same backbone teach this one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from tunewise.core.errors import UserError
from tunewise.core.handle import read_adaptation
from tunewise.core.part import Part
from tunewise.core.run import Run

__all__ = ["Distillation"]


class Distillation(Part):
    """weight * f * sum over rows of mean_c (z_c - z_T,c)^2 / rows, z the logits, z_T the teacher's, without gradient.

    The teacher is the same backbone with the tensors of the adaptation in `teacher` (its head too) in the place of
    this one's, in evaluation mode; there is no second model. It costs a forward pass a step.
    schedule  f: "constant" 1, or "ramp": up to 1 over the first tenth of the steps and down to 0 at the last
    Raises `UserError` for a teacher that has other tensors or shapes than the student (another recipe, another number
    of classes). Source: PANDA, arXiv 2208.10160, whose weight is 0.1 beta with beta = 0.1.
    """

    slot: ClassVar[str] = "objective"
    teacher: str | None = None
    weight: Annotated[float, Field(ge=0)] = 0.01
    schedule: Literal["constant", "ramp"] = "constant"

    def prepare(self, run: Run) -> None:
        if self.teacher is None or not self.weight:
            return
        _, saved = read_adaptation(self.teacher)
        for name, info in run.tensors.all().items():
            if name not in saved:
                raise UserError(
                    f"The teacher {self.teacher} has no tensor {name}: it was made with another recipe."
                )
            if saved[name].shape != info.tensor.shape:
                raise UserError(
                    f"The teacher {self.teacher} has {name} of shape {tuple(saved[name].shape)}, and the student's is "
                    f"{tuple(info.tensor.shape)}: use the same options and classes."
                )

    @property
    def folder(self) -> str:
        """Where the teacher's tensors are: a run's folder holds them one level below."""
        below = Path(str(self.teacher)) / "adaptation"
        return str(below if (below / "adaptation.json").is_file() else self.teacher)

    def factor(self, run: Run) -> float:
        """f at this step."""
        total, up = max(run.total_steps, 1), max(run.total_steps // 10, 1)
        if self.schedule == "constant":
            return 1.0
        return (run.step + 1) / up if run.step < up else max(total - run.step, 0) / max(total - up, 1)

    def loss(self, run: Run, batch: Any, logits: Tensor, outputs: Any, units: float) -> Tensor:
        """The share of one micro-batch."""
        if self.teacher is None:
            return logits.new_zeros((), dtype=torch.float32)
        wanted = self._answers(run, batch)
        if logits.dim() != 2 or wanted.shape != logits.shape:
            raise UserError(
                f"Distillation compares logits [rows, classes], not {list(logits.shape)} with {list(wanted.shape)}."
            )
        apart = (logits.float() - wanted).square().mean(-1).sum()
        return self.factor(run) * apart / units

    @torch.no_grad()
    def _answers(self, run: Run, batch: Any) -> Tensor:
        modes = {module: module.training for module in run.model.modules()}
        run.model.eval()
        try:
            with run.reference(self.folder).active():
                return run.forward(batch)[0].float()
        finally:
            for module, mode in modes.items():
                module.training = mode
