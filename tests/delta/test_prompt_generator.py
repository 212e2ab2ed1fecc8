"""Prompts generated for each instance: what they depend on, images and text, caches, and what is refused."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.delta.small import moved
from tests.models import tiny, tiny_batch
from tunewise.core.errors import UserError
from tunewise.core.handle import Handle, attach
from tunewise.core.run import Run
from tunewise.delta.generators import AttentionPool, EdgeConv, LatentQueries
from tunewise.delta.prompt_generator import PromptGenerator, layer_of
from tunewise.delta.rational import gelu_start, rational

METHODS = ("iapt(size=8)", "idpt(neighbours=3)", "dvpt(tokens=3, size=4)")


def adapted(name: str, method: str, move: float = 0.1) -> tuple[Any, Handle]:
    model: Any = tiny(name)
    handle = attach(model, method, seed=0)
    moved(handle, move)
    return model, handle


def inputs(name: str, **options: Any) -> dict[str, Tensor]:
    return {k: v for k, v in tiny_batch(name, **options).items() if k != "labels"}


def generator(handle: Handle, kind: type = PromptGenerator) -> Any:
    return next(t for _, _, t in handle.sites if isinstance(t.part, kind))


def prompts(handle: Handle, t: Any, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    t.shared.reading = (mask, False)
    return t.part.generate(t, hidden).detach()  # type: ignore[no-any-return]


def test_rational_function_starts_at_gelu() -> None:
    x = torch.linspace(-3, 3, 200)
    above, below = gelu_start()
    assert above.numel() + below.numel() == 12
    torch.testing.assert_close(rational(x, above, below), F.gelu(x), atol=1e-2, rtol=0)


def test_pooling_weights_sum_to_one_over_readable_tokens() -> None:
    pool = AttentionPool(size=6)
    w = {n: p.value for n, p in {**pool.common(5, 3), **pool.own(5, 3)}.items()}
    h, mask = torch.randn(2, 7, 5), torch.ones(2, 7, dtype=torch.bool)
    mask[0, 4:] = False
    weights = pool.pooling(w, F.linear(h, w["down"]), mask)
    torch.testing.assert_close(weights.sum(1), torch.ones(2, 3))
    assert not weights[0, 4:].any() and bool((weights[1] > 0).all())


@pytest.mark.parametrize("method", METHODS[:2])
def test_prompts_follow_the_instance_and_not_what_is_masked(method: str) -> None:
    _, handle = adapted("bert", method)
    t = generator(handle)
    h, mask = torch.randn(2, 6, 32), torch.ones(2, 6, dtype=torch.bool)
    mask[:, 4:] = False
    found = prompts(handle, t, h, mask)
    other = h.clone()
    other[:, 4:] = 9.0
    torch.testing.assert_close(prompts(handle, t, other, mask), found)
    torch.testing.assert_close(prompts(handle, t, h[:, :4]), found, atol=1e-5, rtol=1e-5)
    assert float((found[0] - found[1]).abs().max()) > 1e-3
    other[:, 0] += 1.0
    assert float((prompts(handle, t, other, mask) - found).abs().max()) > 1e-3


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("layers", [0, 1, 3])
def test_order_of_tokens_leaves_the_graphs_prompt(norm: str, layers: int) -> None:
    edges = EdgeConv(neighbours=3, layers=layers, norm=norm)  # type: ignore[arg-type]
    w = {n: p.value for n, p in edges.common(5, 1).items()}
    h = torch.randn(2, 7, 5)
    found = edges.prompts(w, h, None, False)
    assert found.shape == (2, 1, 5)
    torch.testing.assert_close(edges.prompts(w, h[:, torch.randperm(7)], None, False), found)


def test_edges_are_those_of_the_equation() -> None:
    edges = EdgeConv(neighbours=2, layers=1)
    w = {n: p.value for n, p in edges.common(4, 1).items()}
    x = torch.randn(1, 5, 4)

    def act(v: Tensor, i: int) -> Tensor:
        return F.leaky_relu(F.layer_norm(v, (4,), w[f"scale{i}"], w[f"shift{i}"]), 0.2)

    states = []
    for i in range(5):
        near = sorted(range(5), key=lambda j: float((x[0, i] - x[0, j]).norm()))[:2]
        seen = [act(w["W0"] @ torch.cat([x[0, j] - x[0, i], x[0, i]]), 0) for j in near]
        states.append(torch.stack(seen).amax(0))
    wanted = act(torch.stack(states) @ w["W1"].T, 1).amax(0)
    torch.testing.assert_close(edges.prompts(w, x, None, False)[0, 0], wanted)


def test_batch_norm_learns_means_and_uses_them_in_evaluation() -> None:
    model, handle = adapted("vit", "idpt(neighbours=3, norm='batch')")
    t = generator(handle)
    before = t.shared.mean0_0.clone()
    model.train()
    model(**inputs("vit", size=4))
    assert not torch.equal(t.shared.mean0_0, before)
    model.eval()
    batch, kept = inputs("vit", size=4), t.shared.mean0_0.clone()
    one = model(pixel_values=batch["pixel_values"][:1]).logits
    torch.testing.assert_close(model(**batch).logits[:1], one, atol=1e-5, rtol=1e-5)
    assert torch.equal(t.shared.mean0_0, kept) and any("mean0" in name for name in handle.buffers())


@pytest.mark.parametrize("method", [*METHODS, "dvpt(variant='code', tokens=3, size=4)"])
@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_images_have_prompts_and_gradients(name: str, method: str) -> None:
    model, handle = adapted(name, method)
    batch = inputs(name)
    found = model(**batch)
    assert found.logits.shape == tiny(name)(**batch).logits.shape
    assert float((found.logits - tiny(name)(**batch).logits).abs().max()) > 1e-4
    found.logits.square().sum().backward()
    lost = [n for n, i in handle.tensors().items() if i.tensor.grad is None or not i.tensor.grad.any()]
    assert not lost
    handle.detach()
    assert torch.equal(model(**batch).logits, tiny(name)(**batch).logits)


def test_the_graph_of_the_last_block_alone() -> None:
    model, handle = adapted("vit", "idpt(neighbours=3)")
    assert [layer_of(s.name) for _, s, t in handle.sites if s.name] == [1]
    model(**inputs("vit")).logits.sum().backward()
    assert all(p.grad is None for n, p in model.named_parameters() if ".tw_" not in f".{n}")


def test_a_shut_gate_is_the_base() -> None:
    for name in ("vit", "bert", "llama"):
        model: Any = tiny(name)
        attach(model, METHODS[2], seed=0)
        batch = inputs(name)
        assert torch.equal(model(**batch).logits, tiny(name)(**batch).logits)


def test_code_variant_shares_bottlenecks_and_starts_shut() -> None:
    model: Any = tiny("vit")
    handle = attach(model, "dvpt(variant='code', tokens=2, size=4)", seed=0)
    names = [n for n in handle.tensors() if "gate" in n]
    assert names == ["shared.shared_bottleneck.gate_0"]  # two blocks, every=3
    assert handle.trainable - sum(p.numel() for p in model.classifier.parameters() if p.requires_grad) == (
        2 * 2 * 32 + (2 * 32 + 1) * 4 + 32 + 1
    )
    only: Any = tiny("vit")
    attach(only, "SharedBottleneck(size=4)", seed=0)
    batch = inputs("vit")
    assert torch.equal(only(**batch).logits, tiny("vit")(**batch).logits)


def test_carried_prompt_equals_states_put_in_by_hand() -> None:
    model, handle = adapted("vit", "CarriedPrompt(tokens=3)")
    plain, batch = tiny("vit"), inputs("vit")
    t = handle.owned["carried_prompt"]
    blocks = list(plain.vit.layers if hasattr(plain.vit, "layers") else plain.vit.encoder.layer)  # type: ignore[union-attr,arg-type]
    h = plain.vit.embeddings(batch["pixel_values"])  # type: ignore[union-attr,operator]
    h = torch.cat([(t.T + t.E).expand(2, -1, -1), h], 1)
    for block in blocks:
        h = block(h)
        h = h[0] if isinstance(h, tuple) else h
    wanted = plain.classifier(plain.vit.layernorm(h[:, 3:])[:, 0])  # type: ignore[union-attr,operator]
    torch.testing.assert_close(model(**batch).logits, wanted)


def test_carried_prompt_feels_no_padding_and_refuses_decoders() -> None:
    model, _ = adapted("bert", "CarriedPrompt(tokens=3)")
    ids = torch.randint(3, 99, (1, 5))
    padded = torch.cat([ids, torch.zeros(1, 3, dtype=torch.long)], 1)
    mask = (padded > 0).long()
    alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(
        model(input_ids=padded, attention_mask=mask).logits, alone, atol=1e-5, rtol=1e-4
    )
    with pytest.raises(UserError, match="prompt_tuning"):
        attach(tiny("llama"), "CarriedPrompt(tokens=3)")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generation_with_a_cache_equals_the_prompt_read_once(name: str, method: str) -> None:
    """Token by token from the cache = the whole text in one pass with the instruction named by labels."""
    model, _ = adapted(name, method, 0.3)
    ids = torch.randint(3, 99, (2, 6))
    mask = torch.ones_like(ids)
    ids[0, :2], mask[0, :2] = 0, 0
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "output_logits": True}
    made = model.generate(input_ids=ids, attention_mask=mask, return_dict_in_generate=True, **options)
    labels = made.sequences.clone()
    labels[:, :6] = -100
    longer = torch.cat([mask, torch.ones(2, 4, dtype=torch.long)], 1)
    places = (longer.cumsum(1) - 1).clamp(min=0)
    whole = {"input_ids": made.sequences, "attention_mask": longer, "position_ids": places}
    found = model(**whole, labels=labels).logits[:, 5:-1]
    torch.testing.assert_close(found, torch.stack(made.logits, 1), atol=1e-5, rtol=1e-5)
    plain: Any = tiny(name)
    assert float((found - plain(**whole).logits[:, 5:-1]).detach().abs().max()) > 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_beams_read_the_same_instruction(method: str) -> None:
    model, _ = adapted("llama", method, 0.3)
    ids = torch.randint(3, 99, (2, 6))
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 4,
        "do_sample": False,
        "eos_token_id": None,
    }
    both = model.generate(input_ids=ids, num_beams=3, **options)
    options["attention_mask"] = options["attention_mask"][1:]  # type: ignore[index]
    assert torch.equal(model.generate(input_ids=ids[1:], num_beams=3, **options), both[1:])


@pytest.mark.parametrize("method", METHODS)
def test_the_answer_never_reaches_the_prompts(method: str) -> None:
    model, _ = adapted("llama", method, 0.3)
    ids = torch.randint(3, 99, (1, 8))
    labels = ids.clone()
    labels[:, :4] = -100
    other = ids.clone()
    other[:, 6:] = 5
    found = model(input_ids=ids, labels=labels).logits
    again = model(input_ids=other, labels=labels).logits
    torch.testing.assert_close(again[:, :6], found[:, :6])
    assert float((model(input_ids=other).logits - model(input_ids=ids).logits)[:, :6].abs().max()) > 1e-4


def test_a_run_tells_where_the_answer_begins() -> None:
    model, handle = adapted("llama", METHODS[0], 0.3)
    ids = torch.randint(3, 99, (1, 8))
    labels = ids.clone()
    labels[:, :4] = -100
    batch = SimpleNamespace(inputs={"input_ids": ids}, labels=labels)
    run = Run(handle)
    torch.testing.assert_close(run.outputs(batch).logits, model(input_ids=ids, labels=labels).logits)
    assert run.reads is None


def test_what_cannot_be_told_apart_is_refused() -> None:
    model, handle = adapted("llama", METHODS[0])
    ids = torch.randint(3, 99, (1, 5))
    with pytest.raises(UserError, match="without a cache"):
        model.generate(input_ids=ids, max_new_tokens=2, use_cache=False)
    handle.deactivate()
    cache = model(input_ids=ids, use_cache=True).past_key_values
    handle.activate()
    with pytest.raises(UserError, match="filled without"):
        model(input_ids=ids[:, :1], past_key_values=cache)
    with pytest.raises(UserError, match=r"Instruction\(\)"):
        lone: Any = tiny("bert")
        attach(lone, PromptGenerator(2, generator=AttentionPool(size=4)))
        lone(**inputs("bert"))
    with pytest.raises(UserError, match="encoder-decoder"):
        attach(tiny("t5"), METHODS[0])
    with pytest.raises(UserError, match="must be 1"):
        attach(tiny("bert"), PromptGenerator(2, generator=EdgeConv()))
    with pytest.warns(UserWarning, match="all tokens"):
        model.train()(input_ids=ids)


def test_every_counts_shared_sets() -> None:
    handle = attach(tiny("bert"), "dvpt(tokens=3, size=4, every=1)", seed=0)
    assert {n for n in handle.tensors() if "gate" in n} == {
        "shared.prompt_read_back.gate_0",
        "shared.prompt_read_back.gate_1",
    }
    assert handle.trainable == 2 * sum(p.value.numel() for p in LatentQueries(size=4).common(32, 3).values())


def test_copies_generate_on_their_own() -> None:
    model, handle = adapted("bert", METHODS[0])
    batch = inputs("bert")
    wanted = model(**batch).logits
    twin = copy.deepcopy(model)
    moved(handle, 0.5)
    torch.testing.assert_close(twin(**batch).logits, wanted)


@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
def test_two_passes_before_a_checkpointed_backward(name: str) -> None:
    """Each recomputation sees the prompts of its own pass."""
    found = []
    for saving in (False, True):
        model, handle = adapted(name, METHODS[0])
        if saving:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for module in model.modules():
            module.training = hasattr(module, "gradient_checkpointing")
        first, second = (model(**inputs(name, seed=s)).logits.square().sum() for s in (0, 1))
        (first + 2 * second).backward()
        found.append({n: i.tensor.grad for n, i in handle.tensors().items()})
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, atol=1e-5, rtol=1e-4)
