"""m, v <- moments of g; theta <- theta - lr (m / (sqrt(v) + eps) + decay theta)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from tunewise.core.errors import RunError, UserError, did_you_mean
from tunewise.core.part import TAGS, Part
from tunewise.core.run import Run

__all__ = ["AdamW"]


class AdamW(Part):
    """theta <- theta - lr (m / (sqrt(v) + eps) + decay theta), with gradients clipped to norm `clip` (0:
    not).

    Per tag ("direction") or per tensor of a tag ("direction.B"), which goes first: `rates` multiplies lr,
    `decays` replaces decay (biases, scales and gates have none), `ascend` names what goes up instead of down.
    Raises `RunError` when the loss or the gradient norm is not finite, before the step. Source: arXiv
    1711.05101.
    """

    slot: ClassVar[str] = "optimizer"
    stage: ClassVar[str] = "clip"
    lr: Annotated[float, Field(ge=0)] | None = None
    decay: Annotated[float, Field(ge=0)] = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: Annotated[float, Field(ge=0)] = 1.0
    rates: dict[str, float] = {}
    decays: dict[str, float] = {"bias": 0.0, "scale": 0.0, "gate": 0.0, "magnitude": 0.0}
    ascend: tuple[str, ...] = ()

    def setup(self, run: Run, lr: float) -> None:
        """Makes the optimizer: one group per tag, and per tensor that is named. `UserError` for a name of none."""
        infos = run.tensors.all()
        there = {name: f"{info.tag}.{name.rpartition('.')[2]}" for name, info in infos.items()}
        named = dict.fromkeys([*self.rates, *self.decays, *self.ascend])
        for key in named:
            what, known = ("name", [*there.values()]) if "." in key else ("tag", [*TAGS])
            if key not in known:
                raise UserError(f'AdamW: no tensor has the {what} "{key}"{did_you_mean(key, known)}')
        groups: dict[str, list[torch.nn.Parameter]] = {}
        for name, info in infos.items():
            group = there[name] if there[name] in named else info.tag
            groups.setdefault(group, []).append(info.tensor)
        run.tensors.optimizer = torch.optim.AdamW(
            [
                {
                    "params": params,
                    "tag": group,
                    "lr": lr * _value(self.rates, group, 1.0),
                    "base_lr": lr * _value(self.rates, group, 1.0),
                    "weight_decay": _value(self.decays, group, self.decay),
                    "maximize": bool({group, group.partition(".")[0]} & {*self.ascend}),
                }
                for group, params in groups.items()
            ],
            betas=self.betas,
            eps=self.eps,
        )

    def step(self, run: Run, micro: Sequence[Any], factor: float, backward: Any) -> float:
        """One optimizer step over micro-batches; gives the step's loss. `factor` is the schedule's."""
        optimizer = run.tensors.optimizer
        assert optimizer is not None
        optimizer.zero_grad(set_to_none=True)
        units = max(sum(float(batch.units.sum()) for batch in micro), 1.0)
        total = 0.0
        for batch in micro:
            loss = backward(batch, units)
            total += loss
        if total != total or abs(total) == float("inf"):
            raise RunError(
                f"The loss became {total} at step {run.step + 1}; a lower learning rate usually helps."
            )
        run.fire("gradients")
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        optimizer.step()
        return total

    def gradients(self, run: Run) -> None:
        """g <- g min(1, clip / |g|), at its place among the other parts that change gradients."""
        params = [i.tensor for _, i in run.tensors.active() if i.tensor.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(params, self.clip or float("inf"))
        if not torch.isfinite(norm):
            raise RunError(
                f"A gradient became {float(norm)} at step {run.step + 1}; a lower learning rate usually helps."
            )
        run.metrics["gradient_norm"] = float(norm)

    def state_dict(self, run: Run) -> dict[str, Any]:
        """Moments by tensor name, so that they fit whatever the order of the groups."""
        optimizer = run.tensors.optimizer
        if optimizer is None:
            return {}
        infos = run.tensors.all().items()
        return {n: dict(optimizer.state[i.tensor]) for n, i in infos if i.tensor in optimizer.state}

    def load_state_dict(self, run: Run, state: dict[str, Any]) -> None:
        """Puts moments back; tensors have their saved sizes already."""
        optimizer = run.tensors.optimizer
        assert optimizer is not None
        for name, info in run.tensors.all().items():
            if name in run.tensors.dropped:
                for group in optimizer.param_groups:
                    group["params"] = [p for p in group["params"] if p is not info.tensor]
            if name in state:
                optimizer.state[info.tensor] = {
                    k: v.to(info.tensor.device if k != "step" else "cpu", copy=True)
                    if torch.is_tensor(v)
                    else v
                    for k, v in state[name].items()
                }


def _value(table: dict[str, float], group: str, otherwise: float) -> float:
    return table.get(group, table.get(group.partition(".")[0], otherwise))
