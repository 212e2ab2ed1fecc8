"""Attention in half precision on a CPU: torch's numbers from plain products, and only where it is meant to be."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.core.toys import run_of, start
from tests.models import tiny, tiny_batch
from tunewise.core.errors import RunError
from tunewise.delta import half_attention
from tunewise.delta.half_attention import HalfAttention, PlainAttention

LEFT = (
    torch.tensor([[False, False, True, True, True], [True] * 5])[:, None, None]
    & torch.ones(5, 5).tril().bool()
)
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"is_causal": True},
    "rows that see nothing": {"attn_mask": LEFT},
    "added": {"attn_mask": torch.where(LEFT | torch.eye(5).bool(), 0.0, -1e4)},
    "scaled": {"scale": 0.3},
}


def qkv(dtype: torch.dtype) -> list[Tensor]:
    make = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 5, 4, generator=make).to(dtype).requires_grad_() for _ in range(3)]


def masks(name: str, dtype: torch.dtype) -> dict[str, Any]:
    found = dict(MASKS[name])
    if "attn_mask" in found and found["attn_mask"].dtype != torch.bool:
        found["attn_mask"] = found["attn_mask"].to(dtype)
    return found


@pytest.mark.parametrize("name", MASKS)
def test_outputs_and_gradients_are_those_of_torch(name: str) -> None:
    results = []
    for ours in (False, True):
        tensors = qkv(torch.bfloat16)
        options = masks(name, torch.bfloat16)
        if ours:
            with HalfAttention():
                y = F.scaled_dot_product_attention(*tensors, **options)
            assert type(y.grad_fn).__name__ == "PlainAttentionBackward"
        else:
            y = F.scaled_dot_product_attention(*tensors, **options)
        y.float().square().sum().backward()
        results.append([y.detach(), *(t.grad for t in tensors)])
    for found, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, wanted, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("heads", [1, 6])
@pytest.mark.parametrize("name", MASKS)
def test_grouped_heads_share_keys(name: str, heads: int) -> None:
    results = []
    options = masks(name, torch.bfloat16)
    if "attn_mask" in options:
        options["attn_mask"] = options["attn_mask"].expand(-1, heads, -1, -1)
    for ours in (False, True):
        make = torch.Generator().manual_seed(0)
        q, k, v = (
            torch.randn(2, h, 5, 4, generator=make).to(torch.bfloat16).requires_grad_() for h in (6, 3, 3)
        )
        with HalfAttention() if ours else nullcontext():
            y = F.scaled_dot_product_attention(q, k, v, **options, enable_gqa=True)
        y.float().square().sum().backward()
        results.append([y.detach(), q.grad, k.grad, v.grad])
    for found, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, wanted, rtol=4e-2, atol=4e-2)


@pytest.mark.parametrize("name", [n for n in MASKS if n != "scaled"])
def test_gradients_are_exact(name: str) -> None:
    options = masks(name, torch.float64)
    mask, causal = options.get("attn_mask"), options.get("is_causal", False)
    tensors = qkv(torch.float64)
    torch.testing.assert_close(
        PlainAttention.apply(*tensors, mask, 0.5, causal),
        F.scaled_dot_product_attention(*tensors, mask, is_causal=causal, scale=0.5),
    )
    assert torch.autograd.gradcheck(lambda *t: PlainAttention.apply(*t, mask, 0.5, causal), tensors)


def test_a_second_derivative_raises() -> None:
    tensors = qkv(torch.float64)
    y = PlainAttention.apply(*tensors, None, 0.5, False)
    with pytest.raises(RunError, match="no second derivative"):
        torch.autograd.grad(y.sum(), tensors, create_graph=True)


@pytest.mark.parametrize(
    "change", [{"dtype": torch.float32}, {"dropout_p": 0.5}, {"long": True}, {"grad": False}], ids=str
)
def test_everything_else_stays_torchs(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = qkv(change.get("dtype", torch.bfloat16))
    if change.get("long"):
        monkeypatch.setattr(half_attention, "LONGEST", 4)
    with HalfAttention(), torch.set_grad_enabled(change.get("grad", True)):
        y = F.scaled_dot_product_attention(*tensors, dropout_p=change.get("dropout_p", 0.0))
    assert type(y.grad_fn).__name__ != "PlainAttentionBackward"


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_models_loss_and_gradients_agree(name: str) -> None:
    found = []
    for ours in (False, True):
        model = tiny(name).to(torch.bfloat16).eval()
        with HalfAttention() if ours else nullcontext():
            model(**tiny_batch(name)).logits.float().square().mean().backward()
        found.append(torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None]))
    assert not torch.equal(*found)  # another way of computing it
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 0.03


@pytest.mark.parametrize(("dtype", "times"), [("bfloat16", 4), ("float32", 0)])
def test_the_loop_uses_it_in_half_precision_alone(dtype: str, times: int) -> None:
    run = run_of("lora(rank=2)", steps=2, dtype=dtype)
    for module in run.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with patch.object(PlainAttention, "apply", side_effect=PlainAttention.apply) as called:
        start(run)
    assert called.call_count >= times if times else not called.call_count
