"""Heads solved exactly: the linear probe, and training that starts there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.loop.test_features import model, run_of
from tunewise.core.errors import UserError
from tunewise.core.handle import attach
from tunewise.core.method import read_recipe
from tunewise.core.run import Run
from tunewise.head import PooledHead
from tunewise.head.solve import _features

PROBED = "ProbedHead()"


def of_head(run: Run) -> Any:
    return next(t for _, _, t in run.handle.sites if isinstance(t.part, PooledHead))


def solved(method: str) -> Run:
    """A run at its first step."""
    run = run_of(model("bert", "AutoModel"), method)
    run.fire("prepare")
    return run


def loss_on(run: Run, weight: Tensor, bias: Tensor) -> float:
    x, y = _features(run, of_head(run).part, "train")
    logits = torch.tensor(x) @ weight.detach().double().T + bias.detach().double()
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(y)))


def test_a_start_at_the_probe_is_the_probe() -> None:
    probe = run_of(model("bert", "AutoModel"), "linear_probe")
    probe.recipe.single("loop").run(probe)  # type: ignore[union-attr]
    t, wanted = of_head(solved(f"lora + {PROBED}")), of_head(probe)
    assert torch.equal(t.weight, wanted.weight) and torch.equal(t.bias, wanted.bias)
    assert t.weight.abs().max() > 0 and probe.metrics["C"] in probe.recipe.single("loop").candidates  # type: ignore


def test_it_is_solved_for_features_with_deltas_as_they_start() -> None:
    plain, prompted = of_head(solved(PROBED)), solved(f"prompt_tuning(tokens=8) + {PROBED}")
    mine = of_head(prompted)
    assert loss_on(prompted, mine.weight, mine.bias) < loss_on(prompted, plain.weight, plain.bias)


def test_modes_and_random_numbers_are_left_as_they_were() -> None:
    run = run_of(model("bert", "AutoModel"), PROBED)
    run.model.train()
    run.model.encoder.layer[0].eval()  # type: ignore[union-attr, index]
    was, seed = [m.training for m in run.model.modules()], torch.get_rng_state()
    run.fire("prepare")
    assert [m.training for m in run.model.modules()] == was and torch.equal(torch.get_rng_state(), seed)


def test_training_goes_on_from_there(tmp_path: Any) -> None:
    run = run_of(model("bert", "AutoModel"), f"bitfit + {PROBED}", lr=1e-3, epochs=20)
    losses: list[float] = []
    run.listen = lambda row: losses.append(row["loss"]) if "loss" in row else None
    run.recipe.single("loop").run(run)  # type: ignore[union-attr]
    start = solved(f"bitfit + {PROBED}")
    t = of_head(start)
    assert sum(losses[-5:]) / 5 < loss_on(start, t.weight, t.bias) < losses[0] + 0.3


def test_refusals() -> None:
    handle = attach(model("bert", "AutoModel"), read_recipe("ProbedHead(outputs=2)"))
    with pytest.raises(UserError, match="solved on the training rows: train with tune"):
        handle.watch(torch.optim.SGD(handle.parameters(), 0.1))
    with pytest.raises(UserError, match="it takes no delta and no other head"):
        run = run_of(model("bert", "AutoModel"), "LatentDecoder() + FitHead()")
        run.recipe.single("loop").run(run)  # type: ignore[union-attr]
