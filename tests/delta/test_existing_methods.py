"""BitFit, LayerNorm tuning, DiffFit: which parameters, scales on branches, refusals."""

from __future__ import annotations

import pytest
import torch

from tests.models import tiny, tiny_batch
from tunewise.core.errors import UserError
from tunewise.core.handle import attach


def test_bitfit_trains_every_bias_and_is_refused_without_any() -> None:
    model = tiny("bert")
    wanted = {n for n, _ in model.named_parameters() if n.endswith("bias")}
    assert set(attach(model, "bitfit").existing) == wanted
    with pytest.raises(UserError, match="LlamaForCausalLM has no biases"):
        attach(tiny("llama"), "bitfit")


def test_layernorm_tuning_trains_every_norm() -> None:
    model = tiny("llama")
    assert set(attach(model, "layernorm_tuning").existing) == {
        n for n, _ in model.named_parameters() if "norm" in n
    }


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_difffit_scales_both_branches_of_every_block(name: str) -> None:
    model = tiny(name)
    handle = attach(model, "difffit")
    assert len(handle.sites) == 4
    assert {n for n in handle.existing} == {
        n for n, _ in tiny(name).named_parameters() if n.endswith("bias") or "norm" in n.lower() or "ln_" in n
    }
    batch = tiny_batch(name)
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(0.05)
        wanted = model(**batch).logits
        handle.merge()
        torch.testing.assert_close(model(**batch).logits, wanted, rtol=1e-4, atol=1e-5)


def test_difffit_keeps_less_for_the_backward_pass_than_full_tuning() -> None:
    def kept(method: str) -> int:
        model = tiny("bert")
        attach(model, method)
        found: dict[int, int] = {}

        def note(x: torch.Tensor) -> torch.Tensor:
            found[x.data_ptr()] = x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            model(**tiny_batch("bert"))
        own = {p.data_ptr() for p in model.parameters()}
        return sum(n for place, n in found.items() if place not in own)

    assert kept("bitfit") < kept("full")
