"""Parameters of 3-D experts (Mixtral, Qwen, GPT-OSS) under LoRA and dense deltas: merged, saved, exported, refused."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.delta.small import moved
from tests.models import tiny, tiny_batch
from tunewise.core.errors import UserError
from tunewise.core.handle import Handle, attach, restore
from tunewise.interop.export import export

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 24},
    ),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
}
METHODS = ["lora(rank=2, sites='experts')", "dora(rank=2, sites='experts')", "hut(rank=2, sites='experts')"]
METHODS += ["weight_compander(sites='experts')", "random_sparse(sites='experts')", "r_amt(sites='experts')"]


@cache
def _config(name: str) -> Any:
    import transformers

    family, options = MODELS[name]
    return getattr(transformers, f"{family}Config")(**{**SMALL, **options})


def moe(name: str) -> nn.Module:
    """A fresh random model with experts, the same every time."""
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = getattr(transformers, f"{MODELS[name][0]}ForCausalLM")(_config(name))
    return model.eval()


def answer(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**{k: v for k, v in tiny_batch("mixtral").items() if k != "labels"}).logits  # type: ignore[no-any-return]


def adapted(name: str, method: str) -> tuple[nn.Module, Handle]:
    model = moe(name)
    handle = attach(model, method, seed=0)
    moved(handle, 0.05)
    return model, handle


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_merged_saved_and_restored(name: str, method: str, tmp_path: Path) -> None:
    plain = answer(moe(name))
    model, handle = adapted(name, method)
    wanted = answer(model)
    assert (wanted - plain).abs().max() > 1e-6
    changes = handle.materialize()
    for _, site, _ in handle.sites:
        assert changes[site.name].shape == (site.count, *(site.out_features, site.in_features))
    handle.save(tmp_path / "saved")
    other = moe(name)
    restore(other, tmp_path / "saved")
    assert torch.equal(answer(other), wanted)
    handle.merge()
    torch.testing.assert_close(answer(model), wanted, rtol=1e-4, atol=1e-5)
    handle.unmerge()
    assert torch.equal(answer(model), wanted)
    handle.detach()
    assert torch.equal(answer(model), plain)


@pytest.mark.parametrize("name", MODELS)
def test_exported_whole_and_refused_as_lora(name: str, tmp_path: Path) -> None:
    model, handle = adapted(name, "lora(rank=2, sites='experts | query')")
    wanted = answer(model)
    export(handle, "hf", tmp_path / "hf")
    again = type(model).from_pretrained(tmp_path / "hf").eval()  # type: ignore[attr-defined]
    torch.testing.assert_close(answer(again), wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(answer(model), wanted)
    with pytest.raises(UserError, match="experts"):
        export(handle, "peft", tmp_path / "peft")
    with pytest.raises(UserError, match=r"LoRA cannot hold a change of .*experts"):
        export(handle, "lora", tmp_path / "lora")


@pytest.mark.parametrize("name", MODELS)
def test_every_expert_learns_through_every_kernel(name: str) -> None:
    answers, grads = [], []
    for kernel in ("eager", "grouped_mm", "batched_mm"):
        model = moe(name)
        model.set_experts_implementation(kernel)  # type: ignore[operator]
        handle = attach(model, "lora(rank=2, sites='experts')", seed=0)
        moved(handle, 0.05)
        model(**tiny_batch("mixtral", size=4, length=16)).loss.backward()
        grads.append([p.grad.clone() for p in handle.parameters()])  # type: ignore[union-attr]
        answers.append(answer(model))
    for found, more in zip(answers[1:], grads[1:], strict=True):
        torch.testing.assert_close(found, answers[0], rtol=1e-4, atol=1e-5)
        for mine, theirs in zip(more, grads[0], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    assert all(bool(g.flatten(1).abs().sum(1).gt(0).all()) for g in grads[0]), "an expert got no gradient"


def test_one_half_of_a_fused_projection() -> None:
    model, handle = adapted("mixtral", "lora(rank=2, sites='up & layers[0]')")
    ((_, site, t),) = handle.sites
    assert site.kind == "experts" and t.B.shape == (4, 48, 2)
    change = handle.materialize()[site.name]
    assert not change[:, :48].any() and change[:, 48:].abs().sum((1, 2)).gt(0).all()


@pytest.mark.parametrize(
    "method", ["loha(sites='experts')", "mola(sites='experts')", "emoe(sites='experts')"]
)
def test_what_knows_no_experts_says_so(method: str) -> None:
    with pytest.raises(UserError, match='"experts" matches only experts sites'):
        attach(moe("mixtral"), method)


def test_dropout_is_refused_instead_of_left_out() -> None:
    with pytest.raises(UserError, match="LoRA has no dropout on the experts .*gate_up_proj"):
        attach(tiny("mixtral"), "lora(dropout=0.1, sites='experts')")


def test_experts_trained_themselves() -> None:
    model = moe("qwen3_moe")
    handle = attach(model, "partial(sites='experts & layers[1]')")
    assert sorted(n.rpartition(".")[2] for n in handle.existing) == ["down_proj", "gate_up_proj"]
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(0.01)
    wanted = answer(model)
    handle.merge()
    assert torch.equal(answer(model), wanted)
