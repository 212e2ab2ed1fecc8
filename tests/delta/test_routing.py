"""Routes by hand: soft, top-k, entropy; and who hears what was decided."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from tests.models import tiny, tiny_batch
from tunewise.core.handle import attach
from tunewise.delta.experts import LoRAExperts
from tunewise.delta.routing import EntropyRoute, Routings, SoftRoute, TopKRoute, spread, top_k_mask, tsallis

P = torch.tensor([0.5, 0.3, 0.15, 0.05])


def weights(route: SoftRoute | TopKRoute | EntropyRoute, p: Tensor) -> Tensor:
    return route.weights(p, (0, 1))


def test_tsallis_is_one_at_uniform_and_nought_at_one_expert() -> None:
    for n in (2, 5, 64):
        for q in (0.5, 1.0, 1.1, 2.0):
            uniform = torch.full((n,), 1 / n, dtype=torch.float64)
            assert float(tsallis(uniform, q)) == pytest.approx(1.0, abs=1e-9)
            one = torch.zeros(n, dtype=torch.float64)
            one[0] = 1.0
            assert abs(float(tsallis(one, q, eps=0.0 if q > 1 else 1e-12))) < 1e-4
    assert tsallis(torch.ones(3, 1), 1.1).tolist() == [0.0, 0.0, 0.0]


def test_tsallis_becomes_shannons_entropy() -> None:
    near, shannon = tsallis(P.double(), 1.0 + 1e-6), tsallis(P.double(), 1.0)
    by_hand = -(P.double() * P.double().log()).sum() / torch.tensor(4.0).double().log()
    torch.testing.assert_close(near, shannon, rtol=1e-5, atol=0)
    torch.testing.assert_close(shannon, by_hand)


@pytest.mark.parametrize("q", [0.5, 1.0, 1.1, 2.0])
def test_tsallis_has_a_finite_gradient_at_nought(q: float) -> None:
    p = torch.tensor([1.0, 0.0, 0.0], requires_grad=True)
    tsallis(p, q).backward()
    assert p.grad is not None and p.grad.isfinite().all()


def test_top_k_is_renormalised_over_the_chosen() -> None:
    assert weights(TopKRoute(2), P).tolist() == pytest.approx([0.625, 0.375, 0.0, 0.0])
    assert weights(TopKRoute(9), P).tolist() == pytest.approx(P.tolist()), "more than there are: all of them"
    assert weights(SoftRoute(), P) is P


def test_lists_are_spread_over_layers() -> None:
    found = [TopKRoute([1, 2, 4]).weights(P, (i, 6)).gt(0).sum().item() for i in range(6)]
    assert found == [1, 1, 2, 2, 4, 4]
    assert [spread([2, 4, 6, 8], (i, 2)) for i in range(2)] == [2, 6]
    assert spread(5, (3, 4)) == 5


def test_the_expert_that_crosses_the_mass_is_left_out_unless_kept() -> None:
    sure = {"threshold": 2.0}
    assert weights(EntropyRoute(0.75, 1, **sure), P).tolist() == pytest.approx([0.5, 0, 0, 0])
    assert weights(EntropyRoute(0.75, 2, **sure), P).tolist() == pytest.approx([0.5, 0.3, 0, 0])
    assert weights(EntropyRoute(0.8001, 1, **sure), P).tolist() == pytest.approx([0.5, 0.3, 0, 0])
    shuffled = weights(EntropyRoute(0.8001, 1, **sure), P[[2, 0, 3, 1]])
    assert shuffled.tolist() == pytest.approx([0, 0.5, 0, 0.3])


def test_entropy_decides_between_some_and_all() -> None:
    uniform, one = torch.full((4,), 0.25), torch.tensor([0.0, 1.0, 0.0, 0.0])
    assert weights(EntropyRoute(), uniform).tolist() == [0.25] * 4
    assert weights(EntropyRoute(), one).tolist() == [0.0, 1.0, 0.0, 0.0]
    assert torch.equal(weights(EntropyRoute(threshold=-1.0), P), weights(SoftRoute(), P))
    both = weights(EntropyRoute(0.75, 1), torch.stack([uniform, P.square() / P.square().sum()]))
    assert (both > 0).sum(-1).tolist() == [4, 1]


def test_renormalising_makes_weights_sum_to_one() -> None:
    w = weights(EntropyRoute(0.75, 2, 2.0, renormalise=True), P)
    assert w.tolist() == pytest.approx([0.625, 0.375, 0, 0])


def test_top_k_mask_marks_exactly_k() -> None:
    scores = torch.tensor([[0.0, 0.0, 0.0], [3.0, 1.0, 2.0]])
    assert top_k_mask(scores, 2).sum(-1).tolist() == [2.0, 2.0]
    assert top_k_mask(scores, 2)[1].tolist() == [1.0, 0.0, 1.0]


def test_routers_are_heard_while_the_model_runs_and_by_nobody_else() -> None:
    model = tiny("llama")
    handle = attach(model, LoRAExperts(experts=3, sites="gate"), seed=0)
    heard: Routings = handle.sites[0][2].part.routings
    model(**tiny_batch("llama"))
    assert not heard.heard
    with heard.listening(model):
        model(**tiny_batch("llama"))
        assert [n.split(".")[-1] for n in heard.heard] == ["gate_proj"] * 2
        p, w = next(iter(heard.heard.values()))
        assert p.shape == w.shape == (2, 8, 3)
        handle.sites[0][1].module(torch.zeros(1, 1, 32))
        assert next(iter(heard.heard.values()))[0] is p, "a call of a layer alone is none of the model"
    assert not heard.heard and not model._forward_hooks and not model._forward_pre_hooks


def test_copies_take_nothing_along_that_was_heard() -> None:
    model = tiny("llama")
    handle = attach(model, LoRAExperts(experts=3, sites="gate"), seed=0)
    heard = handle.sites[0][2].part.routings
    heard.listen(model)
    model(**tiny_batch("llama"))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not twin.tw_adaptations["default"].sites[0][2].part.routings.heard
    heard.rest()


def test_a_pass_made_again_in_backward_is_not_heard() -> None:
    model = tiny("llama")
    handle = attach(model, LoRAExperts(experts=3, sites="gate"), seed=0)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    heard = handle.sites[0][2].part.routings
    model.train()
    with heard.listening(model):
        loss = model(**tiny_batch("llama")).loss
        before = {n: p for n, (p, _) in heard.heard.items()}
        (loss + sum(p.square().sum() for p in before.values())).backward()
        assert all(heard.heard[n][0] is p for n, p in before.items())
