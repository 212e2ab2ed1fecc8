"""Transformer Copilot in generation: caches, padding, beams, sampling, encoder-decoders."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conformance.support import perturb
from tests.models import tiny
from tunewise.core.errors import UserError
from tunewise.core.handle import attach
from tunewise.core.method import get_method
from tunewise.core.recipe import Recipe
from tunewise.core.run import Run
from tunewise.delta.prompt import SoftPrompt
from tunewise.head import Copilot

from .copilot_runs import answer, batch_of, moved, pair_batch


def greedy(model: Any, t: Any, ids: Tensor, mask: Tensor, count: int) -> Tensor:
    """Decoding by the whole formula: everything anew for each token, the answer's slots told by labels."""
    start = ids.shape[1]
    for _ in range(count):
        labels = ids.clone()
        labels[:, :start] = -100
        labels = torch.cat([labels, labels.new_full((len(ids), 1), 7)], 1)  # the next token is asked for
        longer, more = torch.cat([ids, ids[:, -1:]], 1), torch.cat([mask, mask[:, -1:]], 1)
        positions = (more.cumsum(1) - 1).clamp(min=0)
        inputs = {"input_ids": longer, "attention_mask": more, "position_ids": positions}
        found = answer(model, t, SimpleNamespace(inputs=inputs, labels=labels, ids=["a", "b"]))
        ids = torch.cat([ids, found[:, -2].argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, mask[:, -1:]], 1)
    return ids


@pytest.mark.parametrize("pilot", ["lora", "prompt"])
def test_generate_agrees_with_the_formula_cache_on_and_off_and_padding(pilot: str) -> None:
    if pilot == "lora":
        model, handle, t = moved()
    else:
        model = tiny("llama")
        handle = attach(model, Recipe(delta=SoftPrompt(3), head=Copilot()), seed=0)
        perturb(handle, 3, 0.1)
        t = next(t for _, _, t in handle.sites if t.part.slot == "head")
    batch = batch_of((5, 3), pad="left")
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(model.generate(ids, attention_mask=mask, use_cache=False, **options), cached)
    assert torch.equal(greedy(model, t, ids, mask, 6), cached)
    short = model.generate(ids[1:, 2:], **options)
    assert torch.equal(short[0], cached[1, 2:])
    handle.deactivate()
    plain = model.generate(ids, attention_mask=mask, **options)
    assert not torch.equal(plain, cached)


def test_beams_are_followed() -> None:
    model, _, t = moved()
    ids = batch_of((5,)).inputs["input_ids"]
    options = {
        "max_new_tokens": 5,
        "do_sample": False,
        "num_beams": 4,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    found = [model.generate(ids, use_cache=c, **options) for c in (True, False)]
    assert torch.equal(*found)

    def score(tokens: Tensor) -> float:
        labels = tokens.clone()
        labels[:, :5] = -100
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        log_p = answer(model, t, SimpleNamespace(inputs=inputs, labels=labels, ids=["a"]))
        return float(log_p[0, 4:-1].gather(1, tokens[0, 5:, None]).sum())

    out = model.generate(ids, return_dict_in_generate=True, output_scores=True, length_penalty=0.0, **options)
    assert score(out.sequences) == pytest.approx(float(out.sequences_scores[0]), abs=1e-3)
    best = model.generate(ids, **{**options, "num_beams": 1})
    assert score(out.sequences) >= score(best) - 1e-4


def test_sampling_and_processors_of_ones_own() -> None:
    model, _, _ = moved()
    ids = batch_of((5,)).inputs["input_ids"]
    torch.manual_seed(0)
    made = model.generate(
        ids, do_sample=True, max_new_tokens=8, bad_words_ids=[[7]], temperature=0.9, top_k=10, pad_token_id=0
    )
    assert 7 not in made[0, 5:].tolist()
    with pytest.raises(UserError, match="takes no prompt_lookup_num_tokens"):
        model.generate(ids, prompt_lookup_num_tokens=2, max_new_tokens=3)
    assert not model._forward_hooks and not model._forward_pre_hooks


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoders_generate_what_the_formula_says(name: str) -> None:
    model, _, t = moved(name)
    batch = pair_batch()
    given = {k: batch.inputs[k] for k in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    options |= {"eos_token_id": None, "forced_eos_token_id": None}
    found = model.generate(**given, **options)
    assert torch.equal(model.generate(**given, use_cache=False, **options), found)
    again = found[:, :1]
    for _ in range(5):
        inputs, labels = {**given, "decoder_input_ids": again}, torch.full_like(again, 5)
        next_ = answer(model, t, SimpleNamespace(inputs=inputs, labels=labels, ids=["a", "b"]))[:, -1]
        again = torch.cat([again, next_.argmax(-1, keepdim=True)], 1)
    assert torch.equal(again, found)
    shorter = model.generate(given["input_ids"][1:, :5], **options)
    assert torch.equal(shorter[0], found[1])


def test_an_encoder_decoder_is_trained_in_ones_own_loop() -> None:
    model = tiny("t5")
    recipe = get_method("copilot")(rows=2)
    handle = attach(model, recipe, seed=0)
    run = Run(handle, seed=0)
    batch = pair_batch()
    optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-2)
    handle.watch(optimizer)
    loss_part: Any = handle.recipe["objective"][1]
    seen = []
    model.train()
    for _ in range(12):
        optimizer.zero_grad()
        outputs = model(**batch.inputs, output_hidden_states=True)
        term = loss_part.loss(run, batch, outputs.logits, outputs, 1.0)
        task = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), batch.labels.flatten())
        (task + term).backward()
        optimizer.step()
        seen.append(float(term.detach()))
    assert seen[0] == 0 and seen[-1] < seen[1] - 0.1
