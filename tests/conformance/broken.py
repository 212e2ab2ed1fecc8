"""A sound little delta, and parts broken on purpose, one for each check: the suite must catch them all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunewise.core.delta import Delta, P
from tunewise.core.forward import is_quantized
from tunewise.core.part import Part
from tunewise.core.run import Run
from tunewise.delta.lora import LoRA
from tunewise.loop.single import Single
from tunewise.objective.task_loss import TaskLoss
from tunewise.sites import Site

__all__ = ["BROKEN", "Sound"]


class Sound(Delta):
    """W' = W + B A, rank 2, B at 0."""

    sites: str | list[str] = "linear"

    def tensors(self, site: Site) -> dict[str, P]:
        a = torch.randn(2, site.in_features or 0) * 0.1
        return {"A": P(a, "direction", 0), "B": P(torch.zeros(site.out_features or 0, 2), "direction", 1)}

    def weight(self, t: Any, W: Tensor) -> Tensor:
        return W + t.B @ t.A

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        return 2 * ((site.in_features or 0) + (site.out_features or 0))


def low(t: Any, x: Tensor) -> Tensor:
    """B A x."""
    return F.linear(F.linear(x, t.A), t.B)


class Dead(Sound):
    """Also sits on a layer that no forward pass calls."""

    sites: str | list[str] = "linear | spare"


class WrongTwin(Sound):
    """The thin twin is twice what merging writes."""

    def output(self, t: Any, x: Tensor, y: Tensor) -> Tensor:
        return y + 2 * low(t, x)


class Bent(Sound):
    """Says that it is linear and is not."""

    linear: ClassVar[bool] = True
    weight = Delta.weight

    def output(self, t: Any, x: Tensor, y: Tensor) -> Tensor:
        return y + F.linear(torch.tanh(30 * F.linear(x, t.A)), t.B)


class Forgetful(Sound):
    """Needs a random tensor that is not saved."""

    def tensors(self, site: Site) -> dict[str, P]:
        return {**super().tensors(site), "R": P(torch.randn(2), trainable=False, saved=False)}

    def weight(self, t: Any, W: Tensor) -> Tensor:
        return W + (t.B * t.R) @ t.A


class Jump(Sound):
    """Starts elsewhere and says that it does not."""

    def tensors(self, site: Site) -> dict[str, P]:
        found = super().tensors(site)
        return {**found, "B": P(torch.full_like(found["B"].value, 0.01))}


class Idle(Sound):
    """Owns a tensor that nothing uses, and counts it."""

    def tensors(self, site: Site) -> dict[str, P]:
        return {**super().tensors(site), "c": P(torch.zeros(1))}


class Miscounted(Sound):
    """The formula forgets B."""

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        return 2 * (site.in_features or 0)


class Unwritten(Sound):
    """No formula of its own, so that its count would be compared with itself."""

    formula = Delta.formula


class Global(Sound):
    """Keeps the tensors of whichever adaptation came last in a global place."""

    live: ClassVar[dict[str, Any]] = {}

    def attached(self, adaptation: Any) -> None:
        Global.live = {s.name: t for _, s, t in adaptation.sites}

    def weight(self, t: Any, W: Tensor) -> Tensor:
        mine = Global.live[t.site_name]
        return W + mine.B @ mine.A


class Careless(Sound):
    """Writes a base weight behind the core's back."""

    def attached(self, adaptation: Any) -> None:
        with torch.no_grad():
            adaptation.sites[0][1].module.weight.mul_(1.01)


class Intruder(Sound):
    """Puts a parameter of its own beside the base's."""

    def attached(self, adaptation: Any) -> None:
        adaptation.sites[0][1].module.register_parameter(
            "more", nn.Parameter(torch.zeros(1), requires_grad=False)
        )


class Coarse(Sound):
    """Does nothing in half precision."""

    def output(self, t: Any, x: Tensor, y: Tensor) -> Tensor:
        return y if y.dtype == torch.bfloat16 else y + low(t, x)


class First(Sound):
    """Acts at the first position, padding or not."""

    weight = Delta.weight

    def output(self, t: Any, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([y[:, :1] + 5 * low(t, x[:, :1]), y[:, 1:]], 1) if y.dim() == 3 else y + low(t, x)


class Counting(Sound):
    """Acts differently when a pass is computed again."""

    weight = Delta.weight

    def output(self, t: Any, x: Tensor, y: Tensor) -> Tensor:
        return y + (1 + t.calls % 2) * low(t, x)


class Interpreted(Sound):
    """Acts differently in a compiled graph."""

    def output(self, t: Any, x: Tensor, y: Tensor) -> Tensor:
        return y + (2 if torch.compiler.is_compiling() else 1) * low(t, x)


class Blind(Sound):
    """Does nothing on a quantized base."""

    def weight(self, t: Any, W: Tensor) -> Tensor:
        return W if is_quantized(t.root) else W + t.B @ t.A


class Exaggerating(LoRA):
    """Tells other libraries another change than it computes."""

    rank: int = 2

    def components(self, t: Any) -> tuple[Tensor, Tensor]:
        b, a = super().components(t)
        return 2 * b, a


class Mute(LoRA):
    """Plain LoRA by its type, so that its factors are written, and does nothing."""

    def __new__(cls) -> Any:
        made = LoRA(rank=2)
        made.__dict__["product"] = lambda t, x, W, b: F.linear(x, W, b)
        return made


class Closed(Sound):
    """Keeps a function that cannot be pickled."""

    def tensors(self, site: Site) -> dict[str, P]:
        self.__dict__["f"] = lambda h: h
        return super().tensors(site)


class Climbing(Part):
    """Plain ascent instead of descent."""

    slot: ClassVar[str] = "optimizer"
    lr: float | None = None

    def setup(self, run: Run, lr: float) -> None:
        self.__dict__["rate"] = lr

    def step(self, run: Run, micro: Sequence[Any], factor: float, backward: Callable[..., float]) -> float:
        for _, info in run.tensors.active():
            info.tensor.grad = None
        loss = sum(backward(batch, float(len(batch))) for batch in micro)
        with torch.no_grad():
            for _, info in run.tensors.active():
                info.tensor.add_(info.tensor.grad, alpha=self.__dict__["rate"])  # type: ignore[arg-type]
        return loss


class Amnesiac(Part):
    """Learns something and keeps it outside its state."""

    slot: ClassVar[str] = "diagnose"

    def gradients(self, run: Run) -> None:
        self.__dict__["n"] = self.__dict__.get("n", 0) + 1
        for _, info in run.tensors.active():
            if info.tensor.grad is not None:
                info.tensor.grad[..., : self.__dict__["n"]] = 0


class Noisy(TaskLoss):
    """A further loss that draws random numbers even with weight 0."""

    weight: float = 0.5

    def before_step(self, run: Run) -> None:
        torch.rand(1)


class PerBatch(TaskLoss):
    """Divides by the rows of the micro-batch instead of the step's."""

    def loss(self, run: Run, batch: Any, logits: Tensor, outputs: Any, units: float) -> Tensor:
        return super().loss(run, batch, logits, outputs, float(len(batch)))


class Eager(Single):
    """Says twice that a step is over."""

    def _one_step(self, run: Run, optimizer: Any, stream: Any, accelerator: Any) -> None:
        super()._one_step(run, optimizer, stream, accelerator)
        run.fire("after_step")


class Dice(Part):
    """A loop that throws dice nobody can repeat."""

    slot: ClassVar[str] = "loop"
    thrown: ClassVar[list[float]] = [0.0]

    def run(self, run: Run) -> None:
        self.thrown[0] += 1.0
        for _, info in run.tensors.active():
            info.tensor.data.fill_(self.thrown[0])


# check -> parts that it must catch; a slot other than delta stands beside `Sound`
BROKEN: dict[str, list[type[Part]]] = {
    "check_identity": [Jump],
    "check_gradients": [Idle],
    "check_count": [Miscounted, Unwritten],
    "check_calls": [Dead],
    "check_linear": [Bent],
    "check_bfloat16": [Coarse],
    "check_padding": [First],
    "check_checkpointing": [Counting],
    "check_compiles": [Interpreted],
    "check_merge": [WrongTwin, Bent],
    "check_materialize": [WrongTwin, Bent],
    "check_export_lora": [Exaggerating],
    "check_peft": [Mute],
    "check_save_restore": [Forgetful],
    "check_two_adaptations": [Global],
    "check_deepcopy": [Global],
    "check_pickle": [Closed],
    "check_detach": [Careless, Intruder],
    "check_base_checkpoint": [Intruder],
    "check_quantized": [Blind],
    "check_loss_falls": [Climbing],
    "check_resume": [Amnesiac],
    "check_lifecycle": [Eager],
    "check_accumulation": [PerBatch],
    "check_zero_weight": [Noisy],
    "check_loop_is_deterministic": [Dice],
}
