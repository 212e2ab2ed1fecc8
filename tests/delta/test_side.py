"""Side networks: exact at full width, blind to the backbone's depth, what each is made of."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.models import tiny, tiny_batch
from tunewise.core.handle import Handle, attach
from tunewise.delta.levi import Views
from tunewise.delta.side_chain import LadderSide, QuantizedSide
from tunewise.delta.side_context import Context, spaced
from tunewise.delta.unipt import Parallel
from tunewise.head.latent_decoder import LatentDecoder

from .side_networks import IDS, NETWORKS, llama, moved


@contextmanager
def saved_bytes() -> Iterator[dict[int, int]]:
    """{storage: bytes} of what autograd keeps."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield kept


@pytest.mark.parametrize("network", NETWORKS, ids=IDS)
def test_what_autograd_keeps_does_not_grow_with_depth(network: Any) -> None:
    sizes, ids = {}, torch.arange(3, 21).view(2, 9)
    for depth in (3, 12, 48):
        model, part = llama(depth), copy.deepcopy(network)
        part.taps = "layers[0, 1, 2]"
        handle = moved(attach(model, part, seed=0))
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with saved_bytes() as kept:
            loss = model(input_ids=ids).logits.square().mean()
        sizes[depth] = sum(n for at, n in kept.items() if at not in weights)
        loss.backward()
        mine = {id(p) for p in handle.parameters()}
        assert all((p.grad is not None) == (id(p) in mine) for p in model.parameters())
    assert sizes[3] == sizes[12] == sizes[48] > 0


def identity_chain(model: nn.Module, part: LadderSide) -> Handle:
    """mu = 1, D_0 = I, Up = I: what is left is the side network's own chain of blocks."""
    handle = attach(model, part)
    t = handle.sites[0][2]
    with torch.no_grad():
        for name in ("D0", "up"):
            getattr(t, name).copy_(torch.eye(32))
            getattr(t, f"{name}_bias").zero_()
        t.a.fill_(100.0)
    return handle


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "llama", "phi3", "vit"])
def test_at_full_width_the_pruned_blocks_are_the_backbone(name: str) -> None:
    model, batch = tiny(name), tiny_batch(name)
    if "attention_mask" in batch:
        batch["attention_mask"][1, -3:] = 0
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3 if p.dim() == 2 else 1)  # a new model attends to almost nothing
        wanted = model(**batch).logits
        handle = identity_chain(model, LadderSide(reduction=1))
        found = model(**batch).logits
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        handle.sites[0][2].query1.mul_(-1)
        assert not torch.allclose(model(**batch).logits, wanted, atol=1e-4)


def test_without_the_chain_a_state_depends_on_its_tap_alone() -> None:
    model, ids = llama(), torch.arange(3, 12)[None]
    handle = attach(model, LadderSide(reduction=4))
    t = handle.sites[0][2]
    assert torch.equal(torch.sigmoid(t.a / 0.1), torch.full((2,), 0.5))
    with torch.no_grad():
        t.a.fill_(-100.0)
        wanted = model(input_ids=ids).logits
        t.D0.normal_()
        t.query0.normal_()
        assert torch.equal(model(input_ids=ids).logits, wanted)
        t.D2.normal_()
        assert not torch.allclose(model(input_ids=ids).logits, wanted)


def test_the_first_mixture_and_what_is_written_are_as_large_as_a_state() -> None:
    t = attach(llama(hidden_size=256), LadderSide(reduction=4), seed=0).sites[0][2]
    x, s = torch.randn(400, 256), torch.randn(400, 64)
    with torch.no_grad():
        mixed = (
            torch.nn.functional.linear(x, t.D0) / 2
            + torch.nn.functional.linear(torch.randn_like(x), t.D1) / 2
        )
        written = torch.nn.functional.linear(s, t.up)
    assert float(mixed.square().mean().sqrt()) == pytest.approx(1, rel=0.1)
    assert float(written.square().mean().sqrt()) == pytest.approx(1, rel=0.1)


def test_pruning_keeps_the_largest_channels_and_pairs_that_turn_alike() -> None:
    model = llama()
    block = model.model.layers[0]
    with torch.no_grad():
        for layer in model.model.layers:
            for m in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.mlp.up_proj):
                m.weight[:, [3, 8, 11, 12, 17, 20, 28, 31]] *= 50
    t = attach(model, LadderSide(reduction=4)).sites[0][2]
    kept = torch.tensor([3, 8, 11, 12, 17, 20, 28, 31])
    rows = torch.cat([8 * h + torch.tensor([0, 4]) for h in range(4)])
    assert torch.equal(t.query0, block.self_attn.q_proj.weight[rows][:, kept])
    assert torch.equal(t.norm, model.model.norm.weight[kept])
    assert t.down0.shape == (8, 16) and t.output0.shape == (8, 8)


def test_side_rotation_is_that_of_its_own_head_size() -> None:
    def rotary(size: int) -> Any:
        config = llama(head_dim=size).config
        made = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
        return made(torch.zeros(1), torch.arange(7)[None])

    x = torch.randn(1, 3, 7, 4)
    cos, sin = (a[..., :8] for a in rotary(16))
    found = Context(torch.zeros(1, 7, 1), None, True, (cos, sin)).rotate(x)
    wanted, _ = transformers.models.llama.modeling_llama.apply_rotary_pos_emb(x, x, *rotary(4))
    torch.testing.assert_close(found, wanted)
    assert spaced(8, 2).tolist() == [0, 4]


def test_an_open_output_gate_is_the_backbone() -> None:
    model, ids = llama(), torch.arange(3, 12)[None]
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        t = moved(attach(model, QuantizedSide(reduction=4))).sites[0][2]
        t.z_out.fill_(200.0)
        assert torch.equal(model(input_ids=ids).logits, wanted)
        t.z_out.fill_(-200.0)
        far = model(input_ids=ids).logits
        t.z_out.zero_()
        half = model(input_ids=ids).logits  # the output layer is linear
        torch.testing.assert_close(half, (far + wanted) / 2)


def test_codes_of_a_quantized_backbone_are_not_touched() -> None:
    from tests.conformance.keeping_checks import Rounded, quantize

    model, ids = llama(), torch.arange(3, 21).view(2, 9)
    with torch.no_grad():
        quantize(model, real=False)
    before = {n: p.dequantize().clone() for n, p in model.named_parameters() if isinstance(p, Rounded)}
    handle = attach(model, QuantizedSide(reduction=4))
    optimizer = torch.optim.AdamW(handle.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert before and losses[-1] < losses[0] - 0.01
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n].dequantize(), w) for n, w in before.items())


def parts_of(part: Parallel, model: nn.Module, ids: Tensor, monkeypatch: Any) -> dict[str, list[Tensor]]:
    """The weights w_i and confidences c of one pass."""
    seen: dict[str, list[Tensor]] = {"w": [], "c": []}
    mean, softmax = Context.mean, Tensor.softmax
    monkeypatch.setattr(Tensor, "softmax", lambda x, d: seen["c"].append(softmax(x, d)) or seen["c"][-1])
    clamp = Tensor.clamp
    monkeypatch.setattr(Tensor, "clamp", lambda x, **k: seen["w"].append(x) or clamp(x, **k))
    model(input_ids=ids)
    monkeypatch.undo()
    assert mean is Context.mean
    return seen


def test_confidences_sum_to_one_and_zero_starts_as_the_base(monkeypatch: Any) -> None:
    model, ids = tiny("bert"), torch.arange(3, 21).view(2, 9)
    wanted = model(input_ids=ids).logits
    handle = attach(model, Parallel(zero=True))
    torch.testing.assert_close(model(input_ids=ids).logits, wanted)
    moved(handle)
    found = parts_of(handle.sites[0][2].part, model, ids, monkeypatch)
    assert found["c"][0].shape == (2, 9, 3)
    torch.testing.assert_close(found["c"][0].sum(-1), torch.ones(2, 9))


def test_attention_without_softmax_has_rows_of_sum_one_or_zero() -> None:
    model = tiny("bert")
    t = attach(model, Parallel()).sites[0][2]
    y = torch.randn(1, 5, 32)
    context = Context(torch.randn(1, 5, 32), None, False, None)
    h = [torch.randn(1, 5, 32)] * 2
    with torch.no_grad():
        t.phi.zero_()
        t.phi_bias.zero_()  # no anchor: w = 0, m_i = t_i, and all are equally sure
        found = t.part.network(t, h, y, context)
        targets = [t.part._target(t, i, x) for i, x in enumerate([context.h0, *h])]
        merged = torch.stack(targets).mean(0)
        wanted = y + torch.nn.functional.linear(merged.relu(), t.up, t.up_bias)
        torch.testing.assert_close(found, wanted)
        t.phi.normal_()
        a = torch.nn.functional.linear(y.relu(), t.phi, t.phi_bias)
        w = (a @ targets[0].mT).relu()
        sums = (w / w.sum(-1, keepdim=True).clamp(min=1e-6)).sum(-1)
        assert all(s == pytest.approx(1, abs=1e-5) or s == 0 for s in sums.flatten().tolist())


def test_ensemble_weights_and_views() -> None:
    model, ids = tiny("bert"), torch.arange(3, 21).view(2, 9)
    first, second = (attach(tiny("bert"), Views(size=6), seed=4).state() for _ in range(2))
    assert all(torch.equal(second[n], v) for n, v in first.items())
    t = attach(model, Views(size=6), seed=4).sites[0][2]
    with torch.no_grad():
        hidden = model.bert(input_ids=ids).last_hidden_state
        torch.testing.assert_close(hidden, hidden[:, :1].expand_as(hidden))  # one state per row
        t.v.copy_(torch.tensor([0.0, 100.0, 0.0]))  # one layer alone
        wanted = model(input_ids=ids).logits
        for name in ("A0", "A2", "G0", "W2"):
            getattr(t, name).normal_()
        torch.testing.assert_close(model(input_ids=ids).logits, wanted)
        other = ids.clone()
        other[:, 4] = 50
        t.A1.zero_()  # what is left comes from the small model
        t.A1_bias.zero_()
        assert not torch.allclose(model(input_ids=other).logits, model(input_ids=ids).logits)
        t.E.fill_(0.3)  # a constant view tells nothing of the text
        assert torch.equal(model(input_ids=other).logits, model(input_ids=ids).logits)


def test_decoders_on_latents_learn_apart_and_leave_the_model_alone() -> None:
    model, ids = tiny("bert").bert, torch.arange(3, 21).view(2, 9)
    wanted = model(input_ids=ids).last_hidden_state
    batch = SimpleNamespace(inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids=["0", "1"])
    ts = []
    for name in ("one", "two"):
        handle = moved(attach(model, LatentDecoder(outputs=3, pooling="none"), name=name, seed=5))
        ts.append(handle.sites[0][2])
    outputs = model(input_ids=ids)
    assert torch.equal(outputs.last_hidden_state, wanted)
    answers = [t.part.logits(t, outputs, batch) for t in ts]
    assert answers[0].shape == (2, 9, 3)
    cells = torch.zeros(2, 9, 1)
    cells[0, 2] = 1  # what is masked has no say
    (answers[0] * cells).square().sum().backward(retain_graph=True)
    alone = {n: p.grad.clone() for n, p in ts[0].named_parameters()}
    assert all(p.grad is None for p in ts[1].parameters())
    for t in ts:
        t.zero_grad()
    sum((a * cells).square().sum() for a in answers).backward()  # type: ignore[union-attr]
    assert all(torch.equal(p.grad, alone[n]) for n, p in ts[0].named_parameters())
    only = LatentDecoder(outputs=3, pooling="none").read_out(ts[0], outputs.last_hidden_state[:1, 2:3])
    torch.testing.assert_close(only, answers[0][:1, 2:3])
