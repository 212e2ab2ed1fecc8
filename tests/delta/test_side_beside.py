"""Side networks beside other things: caches, later tokens, other deltas, other adaptations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.models import tiny
from tunewise.core.errors import UserError
from tunewise.core.handle import attach, restore
from tunewise.delta.levi import Views
from tunewise.delta.side_chain import LadderSide

from .side_networks import IDS, NETWORKS, moved


@pytest.mark.parametrize("network", NETWORKS, ids=IDS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generating_with_and_without_a_cache_is_the_same(name: str, network: Any) -> None:
    model = tiny(name)
    moved(attach(model, copy.deepcopy(network), seed=1), 0.3)
    ids, mask = (
        torch.randint(3, 99, (3, 7), generator=torch.Generator().manual_seed(2)),
        torch.ones(3, 7).long(),
    )
    ids[1, :3], mask[1, :3], ids[2, :5], mask[2, :5] = 0, 0, 0, 0
    options: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 9,
        "min_new_tokens": 9,
        "do_sample": False,
    }
    options |= {"output_logits": True, "return_dict_in_generate": True}
    kept, anew = (model.generate(ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(kept.sequences, anew.sequences)
    for a, b in zip(kept.logits, anew.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    kept, anew = (
        model.generate(ids, use_cache=use, num_beams=3, **options).sequences for use in (True, False)
    )
    assert torch.equal(kept, anew)


def test_caches_that_cannot_be_continued_are_refused() -> None:
    model, ids = tiny("llama"), torch.arange(3, 12)[None]
    handle = attach(model, LadderSide(reduction=4))
    with pytest.raises(UserError, match="not in StaticCache: generate with the default cache"):
        model.generate(ids, cache_implementation="static", max_new_tokens=3)
    handle.deactivate()
    cache = model(input_ids=ids, use_cache=True).past_key_values
    handle.activate()
    with pytest.raises(UserError, match="filled while the side network was off"):
        model(input_ids=ids[:, :1], past_key_values=cache)
    model.train()
    handle.frozen_eval()
    with pytest.raises(UserError, match="keeps nothing in a cache while it is trained"):
        model(input_ids=ids[:, :1], past_key_values=cache)


def test_two_side_networks_share_one_cache() -> None:
    model, ids = tiny("llama"), torch.arange(3, 12)[None]
    for i, network in enumerate(NETWORKS[:4:3]):
        moved(attach(model, copy.deepcopy(network), name=f"n{i}", seed=i), 0.2)
    for handle in model.tw_adaptations.values():
        handle.activate(only=False)
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    kept, anew = (model.generate(ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(kept, anew)


@pytest.mark.parametrize("network", NETWORKS, ids=IDS)
def test_a_later_token_changes_nothing_before_it(network: Any) -> None:
    model, ids = tiny("llama"), torch.arange(3, 12)[None]
    moved(attach(model, copy.deepcopy(network)), 0.2)
    other = ids.clone()
    other[0, 6:] = 77
    with torch.no_grad():
        a, b = (model(input_ids=x).logits for x in (ids, other))
    torch.testing.assert_close(a[:, :6], b[:, :6])
    assert not torch.allclose(a[:, 6:], b[:, 6:])


@pytest.mark.parametrize(("name", "place"), [("llama", "model.norm"), ("gpt2", "transformer.ln_f")])
def test_the_end_is_the_last_norm_or_the_last_block(name: str, place: str) -> None:
    assert attach(tiny(name), LadderSide(reduction=4)).sites[0][1].name == place
    assert attach(tiny("bert"), LadderSide(reduction=4)).sites[0][1].name == "bert.encoder.layer.1"


def test_what_it_cannot_stand_beside_is_refused() -> None:
    with pytest.raises(UserError, match="reads one stack of blocks"):
        attach(tiny("t5"), LadderSide(reduction=4))
    with pytest.raises(UserError, match="no attention with projections that are known"):
        attach(tiny("mamba"), LadderSide(reduction=4))
    with pytest.raises(UserError, match="no token embedding: small=False"):
        attach(tiny("vit"), Views())
    model = tiny("llama")
    attach(model, "prompt_tuning(tokens=3)", name="prompt")
    attach(model, Views(size=6), name="views")
    model.tw_adaptations["prompt"].activate(only=False)
    with pytest.raises(UserError, match="no soft prompt"):
        model(input_ids=torch.arange(3, 12)[None])
    attach(tiny("vit"), Views(small=False))


@pytest.mark.parametrize("network", ["lst(reduction=4)", "levi(size=6)", 'unipt(variant="projected")'])
@pytest.mark.parametrize(
    ("other", "named"),
    [
        ("lora", "LoRA at .*query"),
        ("prompt_tuning(tokens=3)", "SoftPrompt at the input"),
        ("ladder", "Ladder at bert.encoder.layer.1"),
        ("bitfit", "bert.embeddings.LayerNorm.bias"),
        ("series_adapter", "SeriesAdapter at bert.encoder.layer.0.attention"),
    ],
)
def test_what_could_not_learn_beside_a_network_in_its_place_is_refused(
    network: str, other: str, named: str
) -> None:
    model = tiny("bert")
    before = [(n, p.clone()) for n, p in model.named_parameters()]
    with pytest.raises(UserError, match=f"^{named}.* would never learn: .* answers in the place of"):
        attach(model, f"{other} + {network}")
    assert all(torch.equal(p, q) for (_, p), q in zip(before, model.parameters(), strict=True))
    assert not model.tw_adaptations


@pytest.mark.parametrize(
    "recipe",
    [
        'lst(reduction=4) + lora(sites="classifier")',  # behind it
        "lst(reduction=4) + ladder",  # reads where it has answered
        "lora + qst(reduction=4)",
        "lora + unipt",
    ],
)
def test_what_learns_beside_a_side_network_is_taken(recipe: str) -> None:
    model, ids = tiny("bert"), torch.arange(3, 21).view(2, 9)
    handle = moved(attach(model, recipe))
    model(input_ids=ids).logits.square().sum().backward()
    assert all(p.grad is not None for p in handle.parameters())


def test_saved_and_restored_with_other_adaptations(tmp_path: Any) -> None:
    model, ids = tiny("llama"), torch.arange(3, 12)[None]
    recipe = "qst(reduction=4) + series_adapter + prefix_tuning(tokens=2)"
    wanted = moved(attach(model, recipe)).model(input_ids=ids).logits
    model.tw_adaptations["default"].save(tmp_path)
    again = tiny("llama")
    restore(again, tmp_path)
    assert torch.equal(again(input_ids=ids).logits, wanted)
