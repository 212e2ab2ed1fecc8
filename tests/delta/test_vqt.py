"""VQT: queries ask the blocks of a frozen encoder; its states stay bit for bit what they were."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import tiny, tiny_batch
from tunewise.core.errors import UserError
from tunewise.core.handle import attach, restore
from tunewise.core.method import get_method, read_recipe
from tunewise.delta.asking import Attention, ask, attention_of
from tunewise.delta.vqt import VisualQueries


def pixels(name: str = "vit", size: int = 2) -> dict[str, Tensor]:
    batch = tiny_batch(name, size=size)
    batch.pop("labels")
    return batch


def put(name: str = "vit", **options: Any) -> tuple[Any, Any, Any]:
    """(model, handle, the delta's tensors), W moved away from zero."""
    model: Any = tiny(name)
    handle = attach(model, get_method("vqt")(**{"queries": 2, **options}), seed=0)
    t: Any = next(t for _, _, t in handle.sites if isinstance(t.part, VisualQueries))
    with torch.no_grad():
        t.W.normal_(generator=torch.Generator().manual_seed(1))
    return model, handle, t


def states(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """What every block gives."""
    found: list[Tensor] = []
    blocks = [m for m in model.modules() if type(m).__name__ in ("ViTLayer", "Dinov2Layer", "BertLayer")]
    hooks = [
        b.register_forward_hook(lambda m, a, y: found.append(y[0] if isinstance(y, tuple) else y))
        for b in blocks
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_states_are_bit_equal_and_step_zero_is_the_base(name: str) -> None:
    plain, batch = tiny(name), pixels(name)
    model: Any = tiny(name)
    wanted = states(plain, batch)
    attach(model, "vqt", seed=0)
    assert torch.equal(model(**batch).logits, plain(**batch).logits)
    model, _, _ = put(name)
    found = states(model, batch)
    assert len(found) == len(wanted) == 2 and all(
        torch.equal(a, b) for a, b in zip(found, wanted, strict=True)
    )
    assert not torch.allclose(model(**batch).logits, plain(**batch).logits)


def naive(block: Any, prompt: Tensor, x: Tensor) -> Tensor:
    """Queries and patches through the block together, with a mask that hides the queries from everyone."""
    both = torch.cat([prompt, x], 1)
    mask = torch.zeros(1, 1, both.shape[1], both.shape[1])
    mask[..., : prompt.shape[1]] = float("-inf")
    return block(both, mask)[:, : prompt.shape[1]]


@pytest.mark.parametrize("patches", [5, 9], ids=["projected", "folded"])
@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_answers_and_gradients_are_those_of_rows_in_one_sequence(name: str, patches: int) -> None:
    model: Any = tiny(name)
    block = next(m for m in model.modules() if type(m).__name__ in ("ViTLayer", "Dinov2Layer"))
    make = torch.Generator().manual_seed(0)
    x = torch.randn(2, patches, 32, generator=make)
    one = torch.randn(2, 3, 32, generator=make, requires_grad=True)
    two = one.detach().clone().requires_grad_()
    for p in model.parameters():
        p.requires_grad_(False)
    wanted, found = naive(block, one, x), ask(block, attention_of(block, "block"), two, x, {})
    assert torch.allclose(found, wanted, atol=1e-6)
    wanted.square().sum().backward()
    found.square().sum().backward()
    assert torch.allclose(two.grad, one.grad, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("way", ["function", "modules", "dropout", "folded"])
def test_every_way_to_ask_gives_the_same_answers(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With padding: through the attention function, by key and value layers, by these when dropout is on, folded."""
    import tunewise.delta.asking as asking

    model: Any = tiny("bert")
    block = next(m for m in model.modules() if type(m).__name__ == "BertLayer")
    x, prompt = torch.randn(2, 9, 32), torch.randn(2, 3, 32)
    hidden = torch.zeros(2, 1, 1, 9).index_fill_(3, torch.tensor([7, 8]), torch.finfo(torch.float32).min)
    found = attention_of(block, "block")
    assert found == Attention("attention.self", "attention.self.key", "attention.self.value")
    wanted = ask(block, Attention("attention.self"), prompt, x[:, :7], {})
    own, calls = asking._folded, []
    monkeypatch.setattr(asking, "_folded", lambda *a: calls.append(1) or own(*a))
    if way == "function":
        found = Attention("attention.self")
    elif way == "modules":
        key = block.attention.self.key
        key.forward = key.forward  # as if something were attached
    elif way == "dropout":
        block.attention.self.train()
        block.attention.self.dropout.p = 1e-9
    assert torch.allclose(ask(block, found, prompt, x, {"attention_mask": hidden}), wanted, atol=1e-6)
    assert calls == ([1] if way == "folded" else [])


def test_logits_are_one_linear_layer_on_the_joined_features() -> None:
    model, _, t = put(normalize=True)
    batch = pixels()
    with torch.no_grad():
        found = model(**batch).logits
        inputs = [model.vit.embeddings(batch["pixel_values"]), *states(model, batch)]
        z = [
            nn.functional.normalize(
                ask(block, attention_of(block, "block"), t.P[i].expand(2, -1, -1), inputs[i], {}).flatten(1),
                dim=1,
            )
            for i, block in enumerate(model.vit.layers)
        ]
        plain = tiny("vit")(**batch).logits
    assert torch.allclose(found, plain + torch.cat(z, 1) @ t.W.T, atol=1e-5)


def test_no_block_hears_the_queries_of_another() -> None:
    model, _, t = put(normalize=False)
    t.W.data[:, 64:] = 0  # reads the first block alone
    model(**pixels()).logits.sum().backward()
    assert t.P.grad[0].abs().max() > 0 and t.P.grad[1].abs().max() == 0


def saved_numbers(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Numbers that autograd keeps for the backward pass, each tensor once, without weights."""
    kept: dict[int, Tensor] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(**batch).logits.sum()
    size = sum(x.untyped_storage().nbytes() // 4 for x in kept.values())
    del loss
    return size


def encoder(patches: int, layers: int = 2) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
    }
    return ViTForImageClassification(ViTConfig(**sizes, image_size=8 * patches, patch_size=8)).eval()


def kept(patches: int, queries: int, layers: int = 2) -> int:
    model = encoder(patches, layers)
    attach(model, get_method("vqt")(queries=queries), seed=0)
    return saved_numbers(model, {"pixel_values": torch.randn(1, 3, 8 * patches, 8 * patches)})


def test_of_the_patches_a_block_keeps_one_row_of_numbers_alone() -> None:
    """Memory that does not grow with patches times blocks at all cannot be had: queries' gradients need the patches."""
    few, many = kept(4, 2), kept(8, 2)
    more = 8 * 8 - 4 * 4
    # what the attention of two layers gets, and once the last states, in which the classifier's input is a row
    assert many - few == (2 + 1) * more * 32
    assert kept(4, 4) - kept(4, 2) >= 2 * 2 * 128  # at least the inner states of the queries' MLP
    plain = encoder(8)
    assert saved_numbers(plain, {"pixel_values": torch.randn(1, 3, 64, 64)}) > 3 * many


def test_nothing_of_the_backbone_has_a_graph() -> None:
    model, handle, _ = put()
    model(**pixels()).logits.sum().backward()
    declared = {id(i.tensor) for i in handle.tensors().values()}
    assert [n for n, p in model.named_parameters() if p.grad is not None and id(p) not in declared] == []
    found: list[bool] = []
    hook = model.vit.layers[1].register_forward_hook(lambda m, a, y: found.append(y.requires_grad))
    model(**pixels())
    hook.remove()
    assert found == [False]


def test_beside_lora_its_changed_states_are_used_and_get_gradients() -> None:
    model: Any = tiny("vit")
    recipe = read_recipe("lora(rank=2, sites='layers[0] & value') + vqt(queries=2)")
    handle = attach(model, recipe, seed=0)
    t: Any = next(t for _, _, t in handle.sites if isinstance(t.part, VisualQueries))
    with torch.no_grad():
        t.W.normal_()
        for p in handle.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    t.W.data[:, :64] = 0  # the second block's queries alone
    model(**pixels()).logits.sum().backward()
    factor = next(i.tensor for n, i in handle.tensors().items() if n.endswith("A") or "lora" in n)
    assert factor.grad is not None and factor.grad.abs().max() > 0


def test_columns_are_chosen_in_the_middle_of_a_run() -> None:
    part = VisualQueries(queries=1, keep=0.25, select_at=0.5)
    model: Any = tiny("vit")
    from tunewise.core.recipe import Recipe
    from tunewise.core.run import Run

    handle = attach(model, Recipe(delta=part), seed=0)
    mine = handle.recipe["delta"][0]
    t: Any = handle.sites[0][2]
    run = Run(handle)
    with pytest.raises(UserError, match="in the middle of a run"):
        mine.before_step(run)
    run.total_steps = 10
    with torch.no_grad():
        t.W.zero_()
        t.W[0, ::4] = 1.0
    for run.step in range(1, 11):
        mine.after_step(run)
        assert t.kept.sum() == (64 if run.step < 5 else 16)
    assert torch.equal(t.kept.nonzero()[:, 0], torch.arange(0, 64, 4))
    model(**pixels()).logits.sum().backward()
    assert t.W.grad[0, 1::4].abs().max() == 0 < t.W.grad[0, ::4].abs().max()


def test_the_penalty_is_the_sum_of_column_norms() -> None:
    from types import SimpleNamespace

    from tunewise.core.run import Run
    from tunewise.objective.column_norm import ColumnNorm

    recipe = get_method("vqt")(queries=1, keep=0.5, penalty=0.01)
    assert [type(p).__name__ for p in recipe["objective"]] == ["TaskLoss", "ColumnNorm"]
    model, handle, t = put(queries=1)
    batch = SimpleNamespace(units=torch.ones(3))
    found = ColumnNorm().loss(Run(handle), batch, torch.zeros(()), None, 6.0)
    assert torch.allclose(found, sum(t.W[:, j].square().sum().sqrt() for j in range(64)) * 0.5)


def test_padding_of_text_is_not_heard() -> None:
    model, _, _ = put("bert")
    ids = torch.randint(3, 99, (1, 6))
    alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    padded = torch.cat([ids, torch.zeros(1, 3, dtype=torch.long)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(1, 3, dtype=torch.long)], 1)
    assert torch.allclose(model(input_ids=padded, attention_mask=mask).logits, alone, atol=1e-5)


def test_saved_restored_copied_detached(tmp_path: Any) -> None:
    model, handle, _ = put(keep=0.5)
    batch = pixels()
    wanted = model(**batch).logits
    handle.save(tmp_path)
    other = tiny("vit")
    restore(other, tmp_path)
    assert torch.equal(other(**batch).logits, wanted)
    assert torch.equal(copy.deepcopy(model)(**batch).logits, wanted)
    handle.detach()
    assert torch.equal(model(**batch).logits, tiny("vit")(**batch).logits)
    assert model.config._attn_implementation == "sdpa" and "tw_asked" not in str(vars(model.vit.layers[0]))


def test_what_is_refused() -> None:
    with pytest.raises(UserError, match="has none: load it with one"):
        attach(tiny("vit").base_model, VisualQueries(), seed=0)
    from transformers import LlamaForSequenceClassification

    with pytest.raises(UserError, match="block of a decoder"):
        attach(LlamaForSequenceClassification(tiny("llama").config), VisualQueries(), seed=0)
