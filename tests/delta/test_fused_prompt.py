"""EPT: the budget, the start, gates, and that padding and caches move nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.delta.small import moved
from tests.models import tiny
from tunewise.core.errors import UserError
from tunewise.core.handle import attach
from tunewise.delta.fused_prompt import FusedPrompt
from tunewise.delta.prompt import SoftPrompt

SMALL = "ept(tokens=3, length=12, reach=16, size=4, spaces=2)"


def test_prompt_and_change_stay_in_the_budget() -> None:
    for width, tokens, length, reach in ((32, 3, 12, 16), (768, 40, 100, 256), (128, 40, 100, 256)):
        part = FusedPrompt(tokens, length=length, reach=reach)
        rank = part.rank(width)
        assert tokens * width + rank * (reach + width) <= length * width
        assert tokens * width + (rank + 1) * (reach + width) > length * width
    with pytest.raises(UserError, match="no rank"):
        attach(tiny("bert"), FusedPrompt(99, length=100, reach=256))


def test_step_zero_is_prompt_tuning() -> None:
    model, plain = tiny("bert"), tiny("bert")
    handle, other = attach(model, SMALL, seed=0), attach(plain, SoftPrompt(3), seed=0)
    ids = torch.randint(3, 99, (2, 6))
    other.sites[0][2].P.data.copy_(handle.sites[0][2].P)
    torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_the_equation() -> None:
    handle = attach(tiny("bert"), SMALL, seed=0)
    moved(handle, 0.2)
    t: Any = handle.sites[0][2]
    gates, change = t.part.gates(t, t.P), t.A @ t.B
    assert abs(float(gates.sum()) - 1) < 1e-6 and gates.shape == (2,)
    scores = torch.softmax((t.P @ t.Wq) @ (change @ t.Wk).T / 2.0, -1)
    fused = t.P + scores @ (change @ t.V1 @ t.V2)
    g = torch.softmax(fused.mean(0) @ t.Wg, 0)
    wanted = fused + sum(g[k] * torch.relu(fused @ t.D[k]) @ t.U[k] for k in range(2))
    torch.testing.assert_close(t.part.prompt(t, 1, {}), wanted)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_constants_in_their_place_answer_the_same(name: str) -> None:
    """P* in a soft prompt and E + A B as input embeddings: what is kept for inference."""
    model, plain = tiny(name), tiny(name)
    handle, other = attach(model, SMALL, seed=0), attach(plain, SoftPrompt(3), seed=0)
    moved(handle, 0.2)
    t: Any = handle.sites[0][2]
    other.sites[0][2].P.data.copy_(t.part.prompt(t, 1, {}))
    ids = torch.randint(3, 99, (2, 20))
    embeds = plain.get_input_embeddings()(ids)  # type: ignore[operator]
    embeds[:, :16] += t.A @ t.B
    torch.testing.assert_close(model(input_ids=ids).logits, plain(inputs_embeds=embeds).logits)


def test_tokens_from_a_cache_get_their_own_change() -> None:
    model: Any = tiny("llama")
    moved(attach(model, SMALL, seed=0), 0.2)
    ids = torch.randint(3, 99, (2, 6))
    mask = torch.ones_like(ids)
    ids[0, :2], mask[0, :2] = 0, 0
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    cached = model.generate(input_ids=ids, attention_mask=mask, **options)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **options), cached)
    alone = model.generate(input_ids=ids[:1, 2:], attention_mask=mask[:1, 2:], **options)
    assert torch.equal(alone[0], cached[0, 2:])
