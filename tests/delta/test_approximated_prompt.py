"""APT: the equation, the start, and no gradient through the weight."""

from __future__ import annotations

from typing import Any

import torch

from tests.delta.small import moved
from tests.models import tiny
from tunewise.core.handle import attach
from tunewise.delta.approximated_prompt import ApproximatedPrompt


def ready(move: float = 0.1) -> tuple[Any, Any]:
    model = tiny("bert")
    handle = attach(model, "apt(tokens=5, rank=2)", seed=0)
    moved(handle, move)
    return model, handle


def test_no_prompt_is_the_base_and_length_stays() -> None:
    model, handle = ready(0.0)
    ids = torch.randint(3, 99, (2, 6))
    wanted = tiny("bert")(input_ids=ids).logits
    near = float((model(input_ids=ids).logits - wanted).abs().max())
    assert 0 < near < 0.1 * float(wanted.abs().max())
    for _, _, t in handle.sites:
        t.T.data.zero_()
    torch.testing.assert_close(model(input_ids=ids).logits, wanted, atol=0, rtol=0)
    assert model.bert(input_ids=ids).last_hidden_state.shape == (2, 6, 32)


def test_the_equation_and_its_gradient() -> None:
    _, handle = ready()
    t = handle.sites[0][2]
    x, y = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    part = ApproximatedPrompt(5, 2)
    found = part.output(t, x, y)
    keys = t.T + t.T @ t.M1 @ t.M2
    for r in range(2):
        for i in range(3):
            a = torch.relu(keys @ x[r, i])
            wanted = t.s.exp() * (y[r, i] + a.max().detach() * (a @ t.T))
            torch.testing.assert_close(found[r, i], wanted)
    loose = torch.autograd.grad(found.sum(), t.M2)[0]
    a = torch.relu(x @ keys.T)
    through = t.s.exp() * (y + a.amax(-1, keepdim=True) * (a @ t.T))
    stopped = t.s.exp() * (y + a.amax(-1, keepdim=True).detach() * (a @ t.T))
    torch.testing.assert_close(loose, torch.autograd.grad(stopped.sum(), t.M2, retain_graph=True)[0])
    assert not torch.allclose(loose, torch.autograd.grad(through.sum(), t.M2)[0])


def test_count_and_sites() -> None:
    _, handle = ready()
    assert handle.trainable == 2 * (5 * 32 + 2 * 2 * 32 + 1)


def test_a_cache_is_left_alone() -> None:
    model: Any = tiny("llama")
    moved(attach(model, "apt(tokens=5)", seed=0), 0.2)
    ids = torch.randint(3, 99, (2, 6))
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 5,
        "do_sample": False,
        "eos_token_id": None,
    }
    cached = model.generate(input_ids=ids, **options)
    assert torch.equal(model.generate(input_ids=ids, use_cache=False, **options), cached)
