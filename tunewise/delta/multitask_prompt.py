"""P_k = P * (U_k V_k): one soft prompt for all tasks, times a low-rank matrix of each task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from tunewise.core.delta import P
from tunewise.core.errors import UserError
from tunewise.core.handle import read_adaptation
from tunewise.sites import Site

from .prompt import Folded, SoftPrompt, token_table

if TYPE_CHECKING:
    from tunewise.core.adaptation import Adaptation

__all__ = ["MultitaskPrompt"]

STD = 0.02


class MultitaskPrompt(SoftPrompt):
    """f([P_k; E(x)]), P_k = P * (U_k V_k), P `[tokens, width]`, U `[tasks, tokens, rank]`, V `[tasks, rank, width]`.

    task    the task of every row, unless the model is called with `task_ids` `[rows]`
    source  a saved adaptation with such a prompt (the tasks that were trained together) to start from
    take    what of it: "average" of its tasks' factors, those of its task `source_task`, or P alone ("shared")
    The first column of U and row of V start at 1, the others at noise (std 0.02), so that P_k = P but for noise;
    PEFT starts all at that noise, where P_k is nearly 0. Trainable scalars: tokens width + tasks rank (tokens +
    width). Source: Multitask Prompt Tuning, arXiv 2303.02861, without its distillation from prompts of single tasks
    and its two speeds of learning. Raises `UserError` for tasks that are not there, and sources that do not fit.
    """

    tasks: PositiveInt = 1
    rank: PositiveInt = 1
    task: NonNegativeInt = 0
    source: str | None = None
    take: Literal["average", "task", "shared"] = "average"
    source_task: NonNegativeInt = 0

    def tensors(self, site: Site) -> dict[str, P]:
        if self.task >= self.tasks:
            raise UserError(
                f"MultitaskPrompt: task={self.task} of tasks={self.tasks}; tasks are counted from 0."
            )
        start = self.start(site)
        u = torch.randn(self.tasks, self.tokens, self.rank) * STD
        v = torch.randn(self.tasks, self.rank, start.shape[1]) * STD
        u[:, :, 0] += 1
        v[:, 0] += 1
        return {"P": P(start, "prompt", 0), "U": P(u, "scale", 1), "V": P(v, "scale")}

    @torch.no_grad()
    def attached(self, adaptation: Adaptation) -> None:
        if self.source is None:
            return
        t: Any = next(t for _, _, t in adaptation.sites if t.part is self)
        given = _prompt_of(self.source)
        for name, value in self._taken(given).items():
            mine = t.get_parameter(name)
            if value.shape[-mine.dim() + 1 :] != mine.shape[1:] or (name == "P" and len(value) != len(mine)):
                raise UserError(
                    f"{self.source}: {name} of its prompt has the shape {tuple(value.shape)}; "
                    f"tokens, rank and this model need {tuple(mine.shape)}."
                )
            mine.copy_(value.expand_as(mine))

    def _taken(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.take == "shared":
            return {"P": given["P"]}
        if self.take == "average":
            return {"P": given["P"]} | {n: given[n].mean(0, keepdim=True) for n in "UV"}
        if self.source_task >= len(given["U"]):
            raise UserError(
                f"{self.source} has {len(given['U'])} tasks, and none numbered {self.source_task}."
            )
        return {"P": given["P"]} | {n: given[n][self.source_task][None] for n in "UV"}

    def prompt(self, t: Any, rows: int, kwargs: dict[str, Any]) -> Tensor:
        tasks = kwargs.pop("task_ids", None)
        if tasks is None:
            return self.made(t, self.task)
        tasks = torch.as_tensor(tasks, device=t.P.device).view(-1)
        if len(tasks) != rows or int(tasks.min()) < 0 or int(tasks.max()) >= self.tasks:
            raise UserError(f"task_ids must be one number below {self.tasks} for each of the {rows} rows.")
        return self.made(t, tasks)

    def made(self, t: Any, task: int | Tensor) -> Tensor:
        """P_k of a task `[tokens, width]`, or of each of several `[rows, tokens, width]`."""
        return t.P * (t.U[task] @ t.V[task])  # type: ignore[no-any-return]

    def folded(self, entries: Sequence[tuple[Site, Any]], model: nn.Module) -> Folded:
        """The prompt of `task` as constants: a SoftPrompt and its P."""
        ((site, t),) = entries
        return SoftPrompt(self.tokens, self.keep, self.place), {site.name: {"P": self.made(t, self.task)}}

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        width = token_table(site, type(self).__name__).shape[1]
        return self.tokens * width + self.tasks * self.rank * (self.tokens + width)


def _prompt_of(source: str | Path) -> dict[str, Tensor]:
    """P, U and V of a saved adaptation."""
    _, state = read_adaptation(source)
    found = {n.rpartition(".")[2]: v for n, v in state.items() if n.startswith("multitask_prompt.")}
    if set(found) != {"P", "U", "V"}:
        raise UserError(f"{source} holds no multitask prompt to start from.")
    return found
