"""Losses on routers: values by hand, padding, micro-batches, kinds of rows, gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conformance.support import Case
from tests.conformance.training_checks import start, training_run
from tests.models import tiny, tiny_batch
from tunewise.core.errors import UserError
from tunewise.core.handle import attach
from tunewise.core.method import read_recipe
from tunewise.core.run import Run
from tunewise.delta.experts import LoRAExperts
from tunewise.delta.routing import TopKRoute
from tunewise.objective.balance import (
    Heard,
    LoadBalance,
    LocalBalance,
    RouterEntropy,
    balance,
    heard_routers,
    routed,
)
from tunewise.prepare import carry


def heard(p: Tensor, w: Tensor | None = None, real: Tensor | None = None) -> Heard:
    return Heard("site", p, p if w is None else w, torch.ones(p.shape[:-1]) if real is None else real)


def test_even_use_gives_k_and_one_expert_gives_more() -> None:
    even = torch.full((1, 4, 4), 0.25)
    pairs = torch.tensor([[0, 1], [2, 3], [0, 2], [1, 3]])
    chosen = torch.zeros(4, 4).scatter(1, pairs, 0.5)[None]
    assert float(balance([heard(even, chosen)])) == pytest.approx(2.0), "f sums to k = 2"
    assert float(balance([heard(even, chosen)], counts=False)) == pytest.approx(1.0)
    alone = torch.zeros(1, 4, 4)
    alone[..., 0] = 1.0
    assert float(balance([heard(alone)])) == pytest.approx(4.0)


def test_all_sites_are_one_set_of_tokens_where_they_have_as_many_experts() -> None:
    first, second = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
    assert float(balance([heard(first), heard(second)])) == pytest.approx(1.0)
    three = torch.full((1, 1, 3), 1 / 3)
    assert float(balance([heard(first), heard(three, three)], False)) == pytest.approx((2.0 + 1.0) / 2)


def test_it_is_the_published_switch_loss_of_transformers() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    make = torch.Generator().manual_seed(0)
    logits = [torch.randn(2 * 5, 4, generator=make) for _ in range(3)]
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    wanted = load_balancing_loss_func(tuple(logits), 4, 2, mask)
    found = []
    for one in logits:
        p = one.softmax(-1).view(2, 5, 4)
        found.append(heard(p, TopKRoute(2).weights(p, (0, 1)), mask.float()))
    torch.testing.assert_close(balance(found), wanted)


def test_entropy_is_the_mean_over_real_tokens() -> None:
    p = torch.tensor([[[0.5, 0.5], [1.0, 0.0], [0.5, 0.5]]])
    part: Any = RouterEntropy()
    value = part.value(None, None, [heard(p, real=torch.tensor([[1.0, 1.0, 0.0]]))])
    assert float(value) == pytest.approx(0.5, abs=1e-6)


def test_local_balance_by_hand() -> None:
    part = LocalBalance(delta=0.5, field="kind", first=["1"])
    run: Any = SimpleNamespace(
        streams=SimpleNamespace(
            data={"train": [{"id": "a", "row": {"kind": 1}}, {"id": "b", "row": {"kind": 0}}]}
        )
    )
    batch: Any = SimpleNamespace(ids=["a", "b"])
    w = torch.tensor([[[0.4, 0.3, 0.2, 0.1], [0.3, 0.2, 0.3, 0.2]], [[0.25] * 4, [0.1, 0.1, 0.1, 0.7]]])
    real = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    Z = torch.tensor([[1.05, 0.75, 0.25, 0.15], [0.125, 0.125, 0.375, 0.375]])
    wanted = Z.var() / Z.mean() ** 2
    torch.testing.assert_close(part.value(run, batch, [heard(w, real=real)]), wanted)
    torch.testing.assert_close(part.value(run, batch, [heard(w, real=real)] * 2), 2 * wanted)
    swapped = LocalBalance(delta=0.5, field="kind", first=["0"])
    other = swapped.value(run, batch, [heard(w, real=real)])
    assert float(other) != pytest.approx(float(wanted))
    torch.testing.assert_close(part.value(run, batch, [heard(w[..., [2, 3, 0, 1]], real=real)]), other)


def test_without_a_difference_it_is_nought_only_where_all_are_equal() -> None:
    part: Any = LocalBalance()
    even = torch.full((2, 3, 4), 0.25)
    assert float(part.value(None, SimpleNamespace(ids=[]), [heard(even)])) < 1e-9
    uneven = even.clone()
    uneven[0, 0] = torch.tensor([0.4, 0.2, 0.2, 0.2])
    assert float(part.value(None, SimpleNamespace(ids=[]), [heard(uneven)])) > 1e-4
    one = torch.ones(1, 3, 1)
    assert float(part.value(None, SimpleNamespace(ids=[]), [heard(one)])) == 0.0


def test_halves_need_an_even_number_of_experts() -> None:
    with pytest.raises(UserError, match="half of the experts, and here has 3"):
        LocalBalance().importance([True], 3, "here")


def run_of(part: Any) -> Run:
    run = Run(attach(tiny("llama"), read_recipe(part) if isinstance(part, str) else part, seed=0))
    run.task = SimpleNamespace(losses=None)
    return run


def batch_of(pad: bool) -> Any:
    inputs = {k: v for k, v in tiny_batch("llama", size=2, length=6).items() if k != "labels"}
    if pad:
        inputs["attention_mask"][1, 3:] = 0
    return SimpleNamespace(inputs=inputs, ids=["a", "b"], units=torch.ones(2))


def test_padding_is_not_counted() -> None:
    values = []
    for noise in (0, 7):
        run, batch = run_of(LoRAExperts(4, sites="query")), batch_of(pad=True)
        batch.inputs["input_ids"][1, 3:] = noise
        part = LoadBalance(1.0, counts=False)
        part.before_step(run)
        run.outputs(batch)
        values.append(float(part.loss(run, batch, torch.empty(0), None, 2.0)))
        part.gradients(run)
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert not routed(run)[0].routings.heard


def test_outside_of_a_step_it_makes_a_pass_of_its_own() -> None:
    run, batch = run_of(LoRAExperts(4, sites="query")), batch_of(pad=False)
    part = LoadBalance(1.0)
    alone = part.loss(run, batch, torch.empty(0), None, 2.0)
    assert not routed(run)[0].routings.heard and not run.model._forward_hooks
    part.before_step(run)
    run.outputs(batch)
    torch.testing.assert_close(part.loss(run, batch, torch.empty(0), None, 2.0), alone)
    assert run.metrics["balance_loss"] == pytest.approx(float(alone.detach()))


def test_prompts_before_the_text_count_as_text() -> None:
    run = run_of("prompt_tuning(tokens=3) + mola(experts=2, sites='query')")
    batch = batch_of(pad=True)
    (part,) = routed(run)
    with part.routings.listening(run.model):
        run.outputs(batch)
        real = heard_routers(run, batch)[0].real
    assert real.tolist() == [[1.0] * 9, [1.0] * 6 + [0.0] * 3]


@pytest.mark.parametrize(
    "text", ["mola(balance=50.0)", "dynmole(entropy=50.0, threshold=2.0)", "loramoe(balance=50.0)"]
)
def test_a_large_weight_does_what_it_says(text: str) -> None:
    figures = []
    for recipe in (text, text.replace("50.0", "0.0")):
        run = training_run(Case("x", lambda recipe=recipe: read_recipe(recipe), lr=1e-2), steps=12)
        start(run)
        log = next(p for p in run.recipe["diagnose"])
        figures.append(log.measure(run, list(run.streams.data["valid"])))  # type: ignore[attr-defined]
    strong, none = figures
    key = "router/entropy" if "dynmole" in text else "router/balance"
    assert strong[key] < none[key]


def test_without_routers_it_is_refused_before_anything_runs() -> None:
    from tunewise.core.compat import check
    from tunewise.core.recipe import Recipe

    with pytest.raises(UserError, match="LoadBalance .objective. needs a delta whose routers choose experts"):
        check(read_recipe("lora") + Recipe.of(LoadBalance()))


def test_fields_of_rows_go_with_the_examples() -> None:
    recipe, examples = read_recipe("loramoe(field='kind')"), [{"id": "0"}]
    carry(recipe, [{"id": "0", "kind": "qa"}], examples)
    assert examples == [{"id": "0", "row": {"kind": "qa"}}]
    with pytest.raises(UserError, match="reads the field 'kind', which row 0 does not have"):
        carry(recipe, [{"id": "0", "kid": 1}], [{"id": "0"}])


def test_kinds_of_rows_lead_to_halves() -> None:
    part = LocalBalance(delta=0.5)
    logits = torch.zeros(2, 3, 4, requires_grad=True)
    optimizer = torch.optim.Adam([logits], 0.1)
    for _ in range(200):
        optimizer.zero_grad()
        part._site(heard(logits.softmax(-1)), [True, False]).backward()
        optimizer.step()
    share = logits.detach().softmax(-1).mean(1)
    # the least value has Q in proportion to 1 / I
    torch.testing.assert_close(share[0], torch.tensor([0.125, 0.125, 0.375, 0.375]), rtol=0, atol=5e-3)
    torch.testing.assert_close(share[1], torch.tensor([0.375, 0.375, 0.125, 0.125]), rtol=0, atol=5e-3)


def test_kinds_are_read_from_the_rows_of_the_batch() -> None:
    recipe = "loramoe(field='kind', first=['a'], delta=0.9, balance=1.0)"
    losses = []
    for kinds in (("a", "b"), ("b", "b")):
        run = training_run(Case("x", lambda: read_recipe(recipe), lr=1e-3), steps=1, rows=8)
        rows = [{**e, "row": {"kind": kinds[i % 2]}} for i, e in enumerate(run.streams.data["train"])]
        run.streams.data = {**run.streams.data, "train": rows}
        start(run)
        losses.append(run.metrics["balance_loss"])
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
