"""Parts of a dense FFN as experts: splits, keys from the weights as they are, the dense case, schedules, deployment."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.delta.small import moved
from tests.models import tiny, tiny_batch
from tunewise.core.errors import UserError
from tunewise.core.handle import Handle, attach, restore
from tunewise.core.method import read_recipe
from tunewise.delta.clusters import balanced_clusters, split_rows
from tunewise.delta.hidden_experts import EMoE, SMoEDropout, experts_at

NAMES = ["bert", "llama", "gpt2", "phi3", "t5", "vit"]


def answer(model: nn.Module, name: str) -> Tensor:
    found = model(**tiny_batch(name))
    return found.logits  # type: ignore[no-any-return]


def fronts(handle: Handle) -> list[tuple[Any, Any]]:
    return [(s, t) for _, s, t in handle.sites if "expert" in t.meta]


@pytest.mark.parametrize("how", ["kmeans", "random", "contiguous"])
def test_a_split_gives_every_unit_to_one_of_equal_parts(how: str) -> None:
    W = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))
    found = split_rows(W, 6, how, seed=3)
    assert found.bincount().tolist() == [4] * 6
    assert torch.equal(found, split_rows(W, 6, how, seed=3)), "drawn from the seed"


def test_balanced_k_means_finds_equal_clusters_and_forces_unequal_ones() -> None:
    make = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(4, 6, generator=make)
    X = (centres.repeat_interleave(8, 0) + torch.randn(32, 6, generator=make))[
        torch.randperm(32, generator=make)
    ]
    found = balanced_clusters(X, 4, seed=0)
    nearest = torch.cdist(X, centres).argmin(1)
    assert len({(a, b) for a, b in zip(found.tolist(), nearest.tolist(), strict=True)}) == 4
    uneven = torch.cat([torch.zeros(7, 2), torch.ones(1, 2)])
    assert balanced_clusters(uneven, 2, seed=0).bincount().tolist() == [4, 4]


def test_balanced_k_means_is_as_near_as_the_best_of_all_splits() -> None:
    from itertools import combinations

    for seed in range(5):
        X = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))

        def cost(labels: Tensor, X: Tensor = X) -> float:
            centres = torch.stack([X[labels == g].mean(0) for g in (0, 1)])
            return float((X - centres[labels]).square().sum())

        every = []
        for chosen in combinations(range(8), 4):
            labels = torch.zeros(8, dtype=torch.long)
            labels[list(chosen)] = 1
            every.append(cost(labels))
        found = cost(balanced_clusters(X, 2, seed=0))
        assert found <= sorted(every)[len(every) // 5], "among the best fifth of all splits"


@pytest.mark.parametrize("name", NAMES)
def test_all_experts_are_the_dense_ffn_and_fewer_are_not(name: str) -> None:
    plain = answer(tiny(name), name)
    for k, same in ((8, True), (2, False)):
        model = tiny(name)
        handle = attach(model, EMoE(experts=8, k=k, dense=False), seed=0)
        assert (
            (answer(model, name) - plain).abs().max() < 1e-5
            if same
            else not torch.equal(answer(model, name), plain)
        )
        handle.detach()
        assert torch.equal(answer(model, name), plain)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_it_is_the_sum_of_the_chosen_parts(name: str) -> None:
    model = tiny(name)
    handle = attach(model, EMoE(experts=4, k=2, dense=False, sites="mlp & layers[0]"), seed=0)
    (site, t), back = fronts(handle)[0], handle.sites[1][1]
    turn = (lambda w: w.T) if site.transposed else (lambda w: w)
    W1, b1, W2, b2 = turn(site.module.weight), site.module.bias, turn(back.module.weight), back.module.bias
    act = F.gelu if name == "bert" else (lambda h: F.gelu(h, approximate="tanh"))
    x = torch.randn(5, 32)
    y = back.module(act(site.module(x)))
    wanted = []
    for row in x:
        parts = [(t.expert == i).nonzero()[:, 0] for i in range(4)]
        scores = torch.stack([W1[E].mean(0) @ row for E in parts])
        total = b2
        for i in scores.topk(2).indices.tolist():
            E = parts[i]
            total = total + W2[:, E] @ act(W1[E] @ row + b1[E])
        wanted.append(total)
    torch.testing.assert_close(y, torch.stack(wanted), rtol=1e-4, atol=1e-6)


def test_keys_follow_the_weights_whatever_trains_them() -> None:
    model = tiny("llama")
    recipe = read_recipe("emoe(experts=4, k=1, dense=False, tuned=None, sites='mlp & layers[0]')")
    handle = attach(model, recipe + read_recipe("lora(rank=2, sites='gate & layers[0]')"), seed=0)
    moved(handle, 0.5)
    ((site, t),) = fronts(handle)
    change = handle_change(handle, site.name)
    heard = t.part.routings
    seen: list[Tensor] = []
    hook = site.module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with heard.listening(model):
        model(**tiny_batch("llama"))
        p, w = heard.heard[site.name]
    hook.remove()
    W = site.module.weight + change
    keys = torch.stack([W[t.expert == i].mean(0) for i in range(4)])
    scores = seen[0] @ keys.T
    torch.testing.assert_close(p, scores.softmax(-1), rtol=1e-4, atol=1e-5)
    old = seen[0] @ torch.stack([site.module.weight[t.expert == i].mean(0) for i in range(4)]).T
    assert torch.equal(w.argmax(-1), scores.argmax(-1)) and not torch.equal(old.argmax(-1), scores.argmax(-1))


def handle_change(handle: Handle, name: str) -> Tensor:
    t = next(t for _, s, t in handle.sites if s.name == name and type(t.part).__name__ == "LoRA")
    b, a = t.part.components(t)
    return b @ a  # type: ignore[no-any-return]


@pytest.mark.parametrize("more", ["full", "partial", "lora(rank=2, sites='query | value | mlp')"])
def test_it_composes_with_full_partial_and_lora_tuning_and_is_served_dense(more: str, tmp_path: Path) -> None:
    model = tiny("llama")
    recipe = read_recipe("emoe(experts=8, k=2, tuned=None)") + read_recipe(more)
    handle = attach(model, recipe, seed=0)
    optimizer = torch.optim.SGD(handle.parameters(), 0.1)
    for _ in range(2):
        model.train()
        model(**tiny_batch("llama")).loss.backward()
        optimizer.step()
    served = answer(model.eval(), "llama")
    sparse = answer(model.train(), "llama")
    assert (sparse - served).abs().max() > 1e-5, "the masks act in training"
    model.eval()
    every = next(t.part for _, t in fronts(handle))
    every.dense, every.k = False, 8
    torch.testing.assert_close(answer(model, "llama"), served, rtol=1e-5, atol=1e-5)
    every.dense, every.k = True, 2
    handle.merge()
    torch.testing.assert_close(answer(model, "llama"), served, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    again = type(model).from_pretrained(tmp_path)  # type: ignore[attr-defined]
    torch.testing.assert_close(answer(again, "llama"), served, rtol=1e-5, atol=1e-5)
    assert set(again.state_dict()) == set(tiny("llama").state_dict()), "no new parameter"


def test_gradients_reach_the_chosen_units_alone() -> None:
    model = tiny("bert").train()
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    handle = attach(model, read_recipe("emoe(experts=8, k=1, sites='mlp & layers[1]')"), seed=0)
    ((site, t),) = fronts(handle)
    heard = t.part.routings
    with heard.listening(model):
        model(**tiny_batch("bert", size=1, length=2)).loss.backward()
        used = heard.heard[site.name][1][0, 0].bool()  # the classifier reads the first token alone
    grad = handle.existing[f"{site.name}.weight"].ours.grad
    assert grad is not None
    moved_units = grad.abs().sum(1) > 0
    assert torch.equal(moved_units, used[t.expert])


def test_noise_acts_in_training_alone() -> None:
    model = tiny("bert")
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    attach(model, EMoE(experts=8, k=2, noise=3.0, dense=False), seed=0)
    assert torch.equal(answer(model, "bert"), answer(model, "bert"))
    model.train()
    assert not torch.equal(answer(model, "bert"), answer(model, "bert"))


def test_saved_and_restored_with_its_split(tmp_path: Path) -> None:
    model = tiny("llama")
    handle = attach(model, EMoE(experts=8, k=2, dense=False, split="random", seed=5), seed=0)
    wanted = answer(model, "llama")
    handle.save(tmp_path)
    other = tiny("llama")
    restore(other, tmp_path)
    assert torch.equal(answer(other, "llama"), wanted)
    assert torch.equal(answer(copy.deepcopy(model), "llama"), wanted)


@pytest.mark.parametrize(
    ("name", "part", "words"),
    [
        (
            "llama",
            EMoE(experts=7, k=2),
            "experts=7 does not divide them, the next smaller number that does is 4",
        ),
        ("llama", EMoE(experts=8, sites="gate"), "no whole FFN"),
        ("llama", EMoE(experts=8, sites="query | value"), "no whole FFN"),
        ("mixtral", EMoE(experts=8), "matches only mlp sites .*linear can be used"),
    ],
)
def test_what_is_no_dense_ffn_is_refused(name: str, part: EMoE, words: str) -> None:
    with pytest.raises(UserError, match=words):
        attach(tiny(name), part)


def test_sparse_deployment_is_not_merged() -> None:
    handle = attach(tiny("llama"), EMoE(experts=8, k=2, dense=False))
    with pytest.raises(UserError, match="EMoE cannot be merged"):
        handle.merge()


def test_the_second_projection_alone_says_what_is_missing() -> None:
    model = tiny("llama")
    handle = attach(model, EMoE(experts=8, k=2, dense=False))
    back = next(s for _, s, t in handle.sites if "expert" not in t.meta)
    with pytest.raises(UserError, match="without the first projection"):
        back.module(torch.zeros(1, 64))


@pytest.mark.parametrize("name", NAMES)
def test_zero_logits_and_all_experts_are_the_dense_ffn(name: str) -> None:
    plain, model = answer(tiny(name), name), tiny(name)
    handle = attach(model, SMoEDropout(experts=8), seed=0)
    assert not torch.allclose(answer(model, name), plain, atol=1e-5)
    with torch.no_grad():
        for _, t in fronts(handle):
            t.R.zero_()
            t.r.zero_()
    torch.testing.assert_close(answer(model, name), plain, rtol=1e-5, atol=1e-5)
    handle.sites[0][2].part.k_eval = 2
    assert not torch.allclose(answer(model, name), plain, atol=1e-5)


def test_weights_are_the_softmax_over_the_chosen_times_their_number() -> None:
    model = tiny("llama")
    handle = attach(model, SMoEDropout(experts=8, k_eval=3, sites="mlp & layers[0]"), seed=0)
    ((site, t),) = fronts(handle)
    x, y = torch.randn(4, 32), torch.zeros(4, 64)
    _, w = t.part.route(t, x, y)
    values, best = F.linear(x, t.R, t.r).topk(3)
    wanted = torch.zeros(4, 8).scatter(1, best, 8 * values.softmax(-1))
    torch.testing.assert_close(w, wanted)
    assert w.sum(-1).tolist() == pytest.approx([8.0] * 4)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "exponential", "steps"])
def test_k_grows_from_least_to_most(schedule: str) -> None:
    ks = [experts_at(schedule, t, 300, 2, 16) for t in range(301)]
    assert ks[0] == 2 and ks[-1] == (15 if schedule == "exponential" else 16)
    assert ks == sorted(ks) and len(set(ks)) > 3
    assert experts_at(schedule, 50, 0, 2, 16) == 2
    if schedule == "linear":
        assert ks[150] == 9


def test_the_schedule_counts_steps_and_the_router_never_moves() -> None:
    from tests.conformance.support import Case
    from tests.conformance.training_checks import start, training_run

    case = Case("smoe_dropout", lambda: read_recipe("smoe_dropout(experts=8, k_min=2)"), lr=1e-3)
    run = training_run(case, steps=6)
    front = fronts(run.handle)
    before = [(t.R.clone(), t.r.clone(), t.expert.clone()) for _, t in front]
    ks: list[int] = []
    run.listen = lambda row: ks.append(front[0][1].part.state["k"]) if "loss" in row else None
    start(run)
    assert ks == [2, 3, 4, 5, 6, 7]
    for (_, t), (R, r, expert) in zip(front, before, strict=True):
        assert torch.equal(t.R, R) and torch.equal(t.r, r) and torch.equal(t.expert, expert)
    again = attach(run.model, SMoEDropout(experts=8), name="again")
    assert torch.equal(fronts(again)[0][1].R, before[0][0]), "drawn again from the seed, not saved"
    assert not any("R" in n.rpartition(".")[2] for n in again.state())
