"""HST: a pyramid beside a frozen vision transformer, alone and with meta tokens in the backbone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import tiny, tiny_batch
from tunewise.core.errors import UserError
from tunewise.core.handle import attach, restore
from tunewise.core.method import get_method
from tunewise.delta.hst import HierarchicalSide, MetaTokens


def encoder(layers: int = 4, patches: int = 4, width: int = 32) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = {
        "hidden_size": width,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
    }
    return ViTForImageClassification(ViTConfig(**sizes, image_size=8 * patches, patch_size=8)).eval()


def put(model: Any, **options: Any) -> tuple[Any, Any]:
    """(handle, the side network's tensors)."""
    handle = attach(model, get_method("hst")(**options), seed=0)
    return handle, next(t for _, _, t in handle.sites if isinstance(t.part, HierarchicalSide))


def image(patches: int = 4, rows: int = 2) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.randn(
            rows, 3, 8 * patches, 8 * patches, generator=torch.Generator().manual_seed(3)
        )
    }


def test_stages_halve_the_image_and_read_every_tap_once(monkeypatch: pytest.MonkeyPatch) -> None:
    part = HierarchicalSide()
    assert [list(r) for r in part.stages(12)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert [list(r) for r in part.stages(2)] == [[0], [1]]
    assert sorted(i for r in part.stages(7) for i in r) == list(range(7))
    seen: list[tuple[int, tuple[int, int]]] = []
    block = HierarchicalSide._block

    def spy(self: Any, t: Any, k: int, i: int, x: Tensor, states: Tensor, token: Tensor, size: Any) -> Tensor:
        seen.append((i, tuple(size)))
        assert x.shape == (2, size[0] * size[1], self.widths[k])
        return block(self, t, k, i, x, states, token, size)

    monkeypatch.setattr(HierarchicalSide, "_block", spy)
    model = encoder(patches=8)
    put(model)
    model(**image(8))
    assert seen == [(0, (16, 16)), (1, (8, 8)), (2, (4, 4)), (3, (2, 2))]  # 64 pixels / 4, 8, 16, 32


def test_attention_has_two_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[int] = []
    real = F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
        if q.shape[-1] == 16:  # of the side network: 32 / 2, 48 / 4 ...
            keys.append(k.shape[-2])
        return real(q, k, v, *rest, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model = encoder(layers=1)
    put(model)
    model(**image())
    assert keys == [2]


def test_one_block_by_hand() -> None:
    model = encoder(layers=1)
    _, t = put(model, widths=(8,), heads=(2,))
    with torch.no_grad():
        for p in t.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        pixels = image()["pixel_values"]
        states = model.vit.layers[0](model.vit.embeddings(pixels))
        x = F.conv2d(pixels, t.stem, stride=2, padding=1)
        x = F.relu(F.group_norm(x, 1, t.stem_norm, t.stem_norm_bias))
        x = F.conv2d(x, t.stem2, t.stem2_bias, stride=2)
        size, x = x.shape[-2:], x.flatten(2).mT

        def norm(name: str, z: Tensor) -> Tensor:
            return F.layer_norm(z, (8,), getattr(t, name), getattr(t, f"{name}_bias"))

        def lin(name: str, z: Tensor) -> Tensor:
            return F.linear(z, getattr(t, name), getattr(t, f"{name}_bias"))

        x = norm("in0", x)
        resized = F.interpolate(states[:, 1:].mT.unflatten(2, (4, 4)), size=tuple(size), mode="bilinear")
        tap = lin("bridge0", resized.flatten(2).mT)  # as published: first the resize, then the bridge
        pair = torch.cat([norm("token0", lin("bridge0", states[:, :1])), tap.mean(1, keepdim=True)], 1)
        heads = [
            lin(n, z).unflatten(2, (2, 4)).transpose(1, 2)
            for n, z in (("query0", norm("ask0", x)), ("key0", pair), ("value0", pair))
        ]
        weights = (heads[0] @ heads[1].mT / 2).softmax(-1)
        x = x + lin("proj0", (weights @ heads[2]).transpose(1, 2).flatten(2)) + tap
        x = norm("out0", x + lin("low0", F.gelu(lin("up0", norm("think0", x)))))
        wanted = lin("answer", F.layer_norm(x.mean(1), (8,)))
        found = model(pixel_values=pixels).logits
    assert torch.allclose(found, wanted, atol=1e-5)


def saved_numbers(model: nn.Module, batch: dict[str, Tensor]) -> int:
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(**batch).logits.sum()
    del loss
    return sum(kept.values())


def test_memory_does_not_grow_with_the_depth_of_the_backbone() -> None:
    sizes = []
    for layers in (3, 12, 48):
        model = encoder(layers=layers)
        part = HierarchicalSide(widths=(8, 8, 8), heads=(2, 2, 2))
        part.taps = "layers[0, 1, 2]"
        attach(model, part, seed=0)
        sizes.append(saved_numbers(model, image()))
    assert sizes[0] == sizes[1] == sizes[2] > 0


def test_the_backbone_gets_nothing_without_meta_tokens() -> None:
    model = encoder()
    handle, _ = put(model)
    model(**image()).logits.square().sum().backward()
    mine = {id(i.tensor) for i in handle.tensors().values()}
    assert all(id(p) in mine for p in model.parameters() if p.grad is not None)
    assert not any(
        n.startswith("vit.") for n in handle.tensors() if "tw_" not in n and "hierarchical" not in n
    )


def test_with_meta_tokens_only_they_and_norms_of_blocks_learn_in_the_backbone() -> None:
    model = encoder(layers=2)
    handle, _ = put(model, meta=True)
    batch = image()
    loss = model(**batch).logits.square().sum()
    loss.backward()
    for name, info in handle.tensors().items():
        grad = info.tensor.grad
        if isinstance(info.part, MetaTokens):
            assert grad is not None and grad.abs().max() > 0, name
    own = {n for n, i in handle.tensors().items() if n in dict(model.named_parameters()) and "norm" in n}
    assert own == set(handle.existing) and all(".layers." in n and "norm" in n for n in own) and len(own) == 8
    from tunewise.core.compat import facts

    assert "frozen_backbone" not in facts(get_method("hst")(meta=True))
    assert "frozen_backbone" in facts(get_method("hst")())


def test_meta_tokens_come_from_the_blocks() -> None:
    model = encoder(layers=2)
    handle, t = put(model, meta=True)
    metas = [s for _, _, s in handle.sites if isinstance(s.part, MetaTokens)]
    given: list[Tensor] = []
    plain = type(t.part).tokens

    def spy(self: Any, t: Any, h: list[Tensor]) -> list[Tensor]:
        found = plain(self, t, h)
        given.extend(found)
        return found

    type(t.part).tokens = spy  # type: ignore[method-assign]
    try:
        with torch.no_grad():
            model(**image())
    finally:
        type(t.part).tokens = plain  # type: ignore[method-assign]
    fresh = encoder(layers=2)
    with torch.no_grad():
        x = fresh.vit.embeddings(image()["pixel_values"])
        for i, block in enumerate(fresh.vit.layers):
            both = block(torch.cat([metas[i].M.expand(2, -1, -1), x], 1))
            assert torch.allclose(given[i], both[:, :1], atol=1e-6)
            x = both[:, 1:]


def test_count_and_saving(tmp_path: Any) -> None:
    model = encoder()
    handle, t = put(model)
    assert handle.trainable == sum(p.numel() for p in t.parameters())
    wanted = model(**image()).logits
    handle.save(tmp_path)
    other = encoder()
    restore(other, tmp_path)
    assert torch.equal(other(**image()).logits, wanted)
    big = encoder(layers=12, width=768)
    handle, _ = put(big)
    assert 0.6e6 < handle.trainable < 0.9e6


def test_rows_of_a_batch_do_not_change_each_other() -> None:
    model = encoder()
    put(model)
    batch = image(rows=3)
    model.train()
    with torch.no_grad():
        together = model(**batch).logits
        alone = model(pixel_values=batch["pixel_values"][1:2]).logits
    assert torch.allclose(together[1], alone[0], atol=1e-5)


def test_what_is_refused() -> None:
    with pytest.raises(UserError, match="must divide"):
        put(encoder(), widths=(30,), heads=(4,))
    with pytest.raises(UserError, match="sees pixels"):
        attach(tiny("bert"), get_method("hst")(), seed=0)
    batch = tiny_batch("vit")
    batch.pop("labels")
    dinov2: Any = tiny("dinov2")
    put(dinov2)
    assert dinov2(**batch).logits.shape == (2, 2)
