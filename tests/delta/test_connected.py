"""Connected adapters: the path beside the encoder, its gradients, its ends, and what breaks it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.delta.small import moved
from tests.models import tiny, tiny_batch
from tunewise.core.errors import UserError
from tunewise.core.handle import attach
from tunewise.delta.connected import ConnectedAdapters


def connected(name: str = "bert", move: float = 0.1, **options: Any) -> tuple[Any, Any]:
    model = tiny(name)
    handle = attach(model, ConnectedAdapters(size=4, aside=3, **options), seed=0)
    moved(handle, move)
    return model, handle


def by_hand(model: Any, handle: Any, batch: dict[str, Tensor]) -> Tensor:
    """The last block's answer, from frozen blocks called one by one."""
    state = None
    found: list[Tensor] = []
    ts = [t for _, _, t in handle.sites]
    with handle.disabled():
        encoder = model.bert.encoder
        h = model.bert.embeddings(batch["input_ids"])
        for t, block in zip(ts, encoder.layer, strict=True):
            if state is None:
                state = h @ t.P.T
            y = block(h)
            a = F.relu(y @ t.D.T + t.b)
            h = y + (a + state @ t.R.T) @ t.U.T + t.c
            state = state + F.relu(torch.cat([state, a], -1) @ t.W1.T) @ t.W2.T
            found.append(h)
        return h + state @ ts[-1].V.T


def test_it_follows_the_equations() -> None:
    model, handle = connected()
    batch = {"input_ids": tiny_batch("bert")["input_ids"]}
    wanted = by_hand(model, handle, batch)
    torch.testing.assert_close(model.bert(**batch).last_hidden_state, wanted)


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_step_zero_is_the_base_and_each_stack_has_its_ends(name: str) -> None:
    batch = tiny_batch(name)
    model, handle = connected(name, move=0.0)
    with torch.no_grad():  # where gradients are wanted, attention is computed by other kernels
        base = tiny(name)(**batch).logits
        torch.testing.assert_close(model(**batch).logits, base, rtol=0, atol=0)
    stacks = 2 if name == "t5" else 1
    for tensor in ("P", "V"):
        assert len([n for n in handle.tensors() if n.endswith(f".{tensor}")]) == stacks
    moved(handle, 0.1)
    assert (model(**batch).logits - base).abs().max() > 1e-3


def test_without_the_path_they_are_plain_adapters() -> None:
    model, handle = connected()
    with torch.no_grad():
        for _, _, t in handle.sites:
            t.R.zero_()
            if "V" in t.meta:
                t.V.zero_()
    batch = {"input_ids": tiny_batch("bert")["input_ids"]}
    h = tiny("bert").bert.embeddings(batch["input_ids"])
    for (_, _, t), block in zip(handle.sites, tiny("bert").bert.encoder.layer, strict=True):
        y = block(h)
        h = y + F.relu(y @ t.D.T + t.b) @ t.U.T + t.c
    torch.testing.assert_close(model.bert(**batch).last_hidden_state, h)


def test_the_first_adapter_learns_where_the_frozen_path_is_cut() -> None:
    model, handle = connected()
    slot = handle.recipe["delta"][0]._slot

    def cut(module: Any, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
        (h, *rest), state = args, getattr(args[0], slot, None)
        h = h.detach()
        if state is not None:
            setattr(h, slot, state)
        return (h, *rest)

    model.bert.encoder.layer[1].register_forward_pre_hook(cut)
    model(**tiny_batch("bert")).loss.backward()
    first = handle.sites[0][2]
    assert first.D.grad.abs().max() > 0 and first.W1.grad.abs().max() > 0
    assert first.U.grad is None or not first.U.grad.any()  # it reaches nothing but the cut path


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_with_two_passes_before_one_backward(reentrant: bool) -> None:
    """As a pair of query and document has it."""

    def gradients(checkpointing: bool) -> list[Tensor]:
        model, handle = connected()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        one, two = (model(**tiny_batch("bert", seed=s)).logits for s in (0, 1))
        (one * two).sum().backward()
        return [p.grad for p in handle.parameters()]

    for found, wanted in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_gap_between_blocks_and_a_new_tensor_are_refused_in_words() -> None:
    model = tiny("bert")
    model.bert.encoder.layer.append(tiny("bert").bert.encoder.layer[0])
    attach(model, ConnectedAdapters(sites="layers[0, 2]"))
    with pytest.raises(UserError, match="did not reach bert.encoder.layer.2"):
        model(**tiny_batch("bert"))
    model, _ = connected()
    model.bert.encoder.layer[1].register_forward_pre_hook(lambda module, args: (args[0] + 0, *args[1:]))
    with pytest.raises(UserError, match="did not reach bert.encoder.layer.1"):
        model(**tiny_batch("bert"))


def test_cached_generation_equals_the_uncached() -> None:
    model, _ = connected("llama", move=0.2)
    ids = tiny_batch("llama")["input_ids"][:, :4]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(ids, use_cache=False, **options)
    torch.testing.assert_close(model.generate(ids, use_cache=True, **options), wanted)
    assert not torch.equal(wanted, tiny("llama").generate(ids, **options))


def test_less_than_a_hundredth_of_a_base_size_encoder() -> None:
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        model = BertModel(BertConfig())
    handle = attach(model, "connected_adapters(size=32, aside=32)")
    assert handle.trainable < 0.01 * sum(p.numel() for n, p in model.named_parameters() if ".tw_" not in n)
