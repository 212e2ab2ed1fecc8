"""Figures of routers: by hand, at looks and epochs, and nothing changed by being measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.conformance.support import Case
from tests.conformance.training_checks import start, training_run
from tunewise.core.method import read_recipe
from tunewise.diagnose.routing import RouterLog, router_figures
from tunewise.objective.balance import Heard


def test_figures_by_hand() -> None:
    p = torch.tensor([[[1.0, 0.0], [0.5, 0.5], [0.5, 0.5]]])
    real = torch.tensor([[1.0, 1.0, 0.0]])
    found = router_figures([Heard("a", p, p, real), Heard("b", p[:, 1:], p[:, 1:], real[:, 1:])])
    assert found["router/load"] == {"a": [0.75, 0.25], "b": [0.5, 0.5]}
    assert found["router/entropy"] == pytest.approx((0.5 + 1.0) / 2, abs=1e-3)
    assert found["router/balance"] == pytest.approx((2 * (0.75**2 + 0.25**2) + 1.0) / 2)


@pytest.mark.parametrize(
    "method", ["mola", "dynmole", "loramoe", "emoe(experts=8, k=2)", "smoe_dropout(experts=8)"]
)
def test_looks_and_epochs_leave_one_row_each(method: str) -> None:
    run = training_run(Case("x", lambda: read_recipe(method), lr=1e-4), rows=16, steps=4, evaluations=2)
    rows: list[dict[str, Any]] = []
    run.listen = rows.append
    start(run)
    logged = [r for r in rows if "router/load" in r]
    assert [r["step"] for r in logged] == [2, 4], "two looks, of which both end an epoch"
    for row in logged:
        assert 0.0 <= row["router/entropy"] <= 1.0 and row["router/balance"] > 0.9
        assert all(sum(v) == pytest.approx(1.0, abs=1e-2) for v in row["router/load"].values())
    losses = [r.get("balance_loss") for r in rows if "loss" in r]
    assert all(v is not None for v in losses) is ("experts" not in method or "mola" in method)


def test_the_choice_is_seen_though_the_ffn_is_served_dense() -> None:
    run = training_run(Case("x", lambda: read_recipe("emoe(experts=8, k=1)"), lr=1e-4))
    load = RouterLog().measure(run, list(run.streams.data["valid"]))["router/load"]
    (shares,) = load.values()
    assert len(shares) == 8 and max(shares) > min(shares)


def test_measuring_changes_nothing() -> None:
    def trained(method: str) -> dict[str, torch.Tensor]:
        recipe = read_recipe(method)
        bare = [p for p in recipe["diagnose"] if not isinstance(p, RouterLog)]

        def make() -> Any:
            made = read_recipe(method)
            if not keep:
                made.essential["diagnose"] = bare
            return made

        return start(training_run(Case("x", make, lr=1e-3), steps=4, evaluations=4))

    for keep in (True, False):
        found = trained("mola")
        if keep:
            kept = found
    for name, value in kept.items():
        assert torch.equal(value, found[name]), name
