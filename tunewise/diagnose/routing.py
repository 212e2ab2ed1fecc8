"""What routers do while a run learns: how decided they are, how evenly experts are used, which are used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from pydantic import PositiveInt

from tunewise.core.part import Part
from tunewise.core.run import Run
from tunewise.delta.routing import tsallis
from tunewise.objective.balance import Heard, balance, heard_routers, routed

from .inference import evaluating

__all__ = ["RouterLog", "router_figures"]


class RouterLog(Part):
    """At every look at the validation rows and every end of an epoch: entropy, balance and load of the routers.

    Measured on the first `rows` validation rows (else training rows) in one forward pass in evaluation mode, which
    changes nothing; logged as one row of metrics.jsonl (see `router_figures`), from which the report draws. Without
    looks it is measured once, at the end.
    """

    slot: ClassVar[str] = "diagnose"
    needs: ClassVar[frozenset[str]] = frozenset({"routing"})
    rows: PositiveInt = 32

    def after_step(self, run: Run) -> None:
        looks = getattr(run.settings, "evaluations", 0)
        every = max(1, math.ceil(run.total_steps / looks)) if looks else run.total_steps
        if every and (run.step % every == 0 or run.step == run.total_steps):
            self._log(run)

    def boundary(self, run: Run, kind: str) -> None:
        if kind == "epoch":
            self._log(run)

    def _log(self, run: Run) -> None:
        examples = run.streams.data.get("valid") or run.streams.data.get("train")
        if not examples or run.task is None or self.state.get("step") == run.step:
            return
        self.state["step"] = run.step
        run.log(**self.measure(run, list(examples[: self.rows])))

    @torch.no_grad()
    def measure(self, run: Run, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """`router_figures` of these rows."""
        batch = run.collate(list(examples))
        with evaluating(run.model), ExitStack() as stack:
            for part in routed(run):
                stack.enter_context(part.routings.listening(run.model))
            run.outputs(batch)
            return router_figures(heard_routers(run, batch))


def router_figures(heard: Sequence[Heard]) -> dict[str, Any]:
    """{"router/entropy", "router/balance": means over sites; "router/load": {site: [share of each expert]}}.

    entropy   mean Shannon entropy of p over log N: 0 one expert for sure, 1 undecided
    balance   N sum_i f_i P_i with f the shares of load: 1 for even use, N for one expert alone
    load      the share of expert i in all weight that was given, sum_i = 1
    """
    sites, entropy, even = {}, 0.0, 0.0
    for one in heard:
        load = one.mean(one.w)
        share = load / load.sum()
        sites[one.site] = [round(float(v), 4) for v in share]
        entropy += float(one.mean(tsallis(one.p, 1.0)))
        even += float(balance([one], counts=False) / load.sum())
    return {
        "router/entropy": entropy / len(heard),
        "router/balance": even / len(heard),
        "router/load": sites,
    }
