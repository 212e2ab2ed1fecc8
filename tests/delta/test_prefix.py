"""Prefixes as a gated sum, from a network, and from states in front of every block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tunewise as tw
from tests.models import tiny, tiny_batch
from tunewise.core.errors import UserError
from tunewise.delta.deep_prompt import DeepPrompt
from tunewise.delta.gated_prefix import gated_attention


def moved(name: str, method: Any, size: float = 0.5) -> tuple[Any, tw.Handle]:
    model = tiny(name)
    handle = tw.attach(model, method, seed=0)
    make = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(torch.randn(p.shape, generator=make) * size)
    return model, handle


def test_gates_from_the_sums_equal_concatenated_keys() -> None:
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 5, 8, generator=make) for h in (4, 2, 2))
    pk, pv = (torch.randn(2, 2, 3, 8, generator=make) for _ in range(2))
    mask = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    found, gates = gated_attention(q, k, v, [(pk, pv)], mask)
    whole = F.pad(mask, (3, 0), value=True)
    keys, values = (torch.cat(x, 2).repeat_interleave(2, 1) for x in ((pk, k), (pv, v)))
    torch.testing.assert_close(
        found, F.scaled_dot_product_attention(q, keys, values, whole), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(gates.sum(0), torch.ones(2, 4, 5, 1))
    scores = (q @ keys.mT / 8**0.5).masked_fill(~whole, -torch.inf).softmax(-1)
    torch.testing.assert_close(gates[1, ..., 0], scores[..., :3].sum(-1), rtol=1e-5, atol=1e-5)
    parts = [
        F.scaled_dot_product_attention(q, x.repeat_interleave(2, 1), y.repeat_interleave(2, 1), m)
        for x, y, m in ((k, v, mask), (pk, pv, None))
    ]
    by_hand = (1 - gates[1]) * parts[0] + gates[1] * parts[1]
    torch.testing.assert_close(found, by_hand, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
def test_the_gated_form_has_the_answer_and_the_gradients_of_the_other(name: str) -> None:
    found = []
    for gated in (False, True):
        model, handle = moved(name, f"prefix_tuning(tokens=3, hidden=None, gated={gated})")
        batch = tiny_batch(name)
        if name != "vit":
            batch["attention_mask"][1, 6:] = 0
        out = model(**batch)
        out.loss.backward()
        found.append((out.logits.detach(), [p.grad for p in handle.parameters()]))
    torch.testing.assert_close(*(f[0] for f in found), rtol=1e-5, atol=1e-5)
    for a, b in zip(*(f[1] for f in found), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_network_writes_keys_and_values_of_all_attentions() -> None:
    model, handle = moved("llama", "prefix_tuning(tokens=3, hidden=6)")
    shared = next(iter(handle.owned.values()))
    z = torch.tanh(shared.E @ shared.W1.T + shared.b1)
    for _, _, t in handle.sites:
        k, v = t.part.keys(t)
        assert k.shape == v.shape == (2, 3, 8)
        for head in range(2):
            torch.testing.assert_close(k[head], z @ t.W2[0, head].T + t.b2[0, head])
            torch.testing.assert_close(v[head], z @ t.W2[1, head].T + t.b2[1, head])


def test_values_start_at_nothing() -> None:
    handle = tw.attach(tiny("llama"), "prefix_tuning(tokens=3)", seed=0)
    t: Any = handle.sites[0][2]
    k, v = t.part.keys(t)
    assert not v.any() and k.std() > 0.05


def by_hand(name: str, batch: dict[str, Tensor], prompts: list[Tensor]) -> Tensor:
    """VPT-deep written out: tokens in front of every block's input, cut off its output."""
    model: Any = tiny(name)
    base = getattr(model, model.base_model_prefix)
    count = len(prompts[0])
    more: dict[str, Any] = {}
    if name == "llama":
        h = base.embed_tokens(batch["input_ids"])
        turns = base.rotary_emb(h, position_ids=torch.arange(h.shape[1])[None])
        more["position_embeddings"] = tuple(
            torch.cat([torch.full((1, count, x.shape[2]), fill), x], 1)
            for x, fill in zip(turns, (1.0, 0.0), strict=True)
        )
        blocks = base.layers
    elif name in ("vit", "dinov2"):
        h = base.embeddings(batch["pixel_values"])
        blocks = base.layers if name == "vit" else base.encoder.layer
    else:
        h, blocks = base.embeddings(batch["input_ids"]), base.encoder.layer
    for block, prompt in zip(blocks, prompts, strict=True):
        h = torch.cat([prompt.expand(len(h), -1, -1), h], 1)
        h = block(h, **more)
        h = (h[0] if isinstance(h, tuple) else h)[:, count:]
    if name == "llama":
        return model.lm_head(base.norm(h))  # type: ignore[no-any-return]
    if name == "bert":
        return model.classifier(base.pooler(h))  # type: ignore[no-any-return]
    h = base.layernorm(h)
    parts = torch.cat([h[:, 0], h[:, 1:].mean(1)], 1) if name == "dinov2" else h[:, 0]
    return model.classifier(parts)  # type: ignore[no-any-return]


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "llama", "vit", "dinov2"])
def test_deep_prompts_are_tokens_in_front_of_every_block(name: str) -> None:
    model, handle = moved(name, DeepPrompt(tokens=3), size=5.0)
    batch = {k: v for k, v in tiny_batch(name).items() if k != "labels"}
    wanted = by_hand(name, batch, handle.parameters())
    assert (wanted - tiny(name)(**batch).logits).abs().max() > 1e-4
    torch.testing.assert_close(model(**batch).logits, wanted, rtol=1e-5, atol=2e-6)


def test_gradients_of_deep_prompts_are_those_of_the_tokens() -> None:
    model, handle = moved("vit", DeepPrompt(tokens=3))
    batch = {"pixel_values": tiny_batch("vit")["pixel_values"]}
    model(**batch).logits.square().sum().backward()
    prompts = [p.detach().clone().requires_grad_() for p in handle.parameters()]
    by_hand("vit", batch, prompts).square().sum().backward()
    for a, b in zip(handle.parameters(), prompts, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_the_pass_of_the_prompt_leaves_other_deltas_what_they_had_read() -> None:
    more = 'parallel_adapter(size=4, sites="attention") + qst(reduction=4)'
    model, handle = moved("bert", f"{more} + vpt(tokens=2)")
    alone, other = moved("bert", f"{more} + prefix_tuning(tokens=2, hidden=None)")
    deep = [t for _, _, t in handle.sites if isinstance(t.part, DeepPrompt)]
    prefixes = [t for key, _, t in other.sites if key == "prefix"]
    mine, theirs = handle.tensors(), other.tensors()
    for name in theirs:
        if name in mine:
            theirs[name].tensor.copy_(mine[name].tensor)
    for t, p in zip(deep, prefixes, strict=True):
        k, v = t.part.keys(t)
        p.get_parameter("K").copy_(k[0])
        p.get_parameter("V").copy_(v[0])
    batch = tiny_batch("bert")
    torch.testing.assert_close(model(**batch).logits, alone(**batch).logits, rtol=1e-5, atol=1e-5)


def test_deep_prompts_start_as_published() -> None:
    handle = tw.attach(tiny("vit"), "vpt(tokens=50)", seed=0)
    bound = (6 / (3 * 8**2 + 32)) ** 0.5
    values = handle.parameters()[0]
    assert 0.9 * bound < values.abs().max() <= bound
    with pytest.raises(UserError, match="has no network"):
        tw.attach(tiny("vit"), DeepPrompt(hidden=4))
