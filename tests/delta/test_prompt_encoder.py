"""P-tuning's networks are torch's own layers; multitask prompts are products, one for each row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tunewise as tw
from tests.models import tiny, tiny_batch
from tunewise.core.errors import UserError
from tunewise.delta.multitask_prompt import MultitaskPrompt
from tunewise.delta.prompt_encoder import EncodedPrompt


def tensors(model: nn.Module) -> Any:
    return tw.handles(model)["default"].sites[0][2]


@torch.no_grad()
def test_the_lstm_is_torchs_lstm() -> None:
    model = tiny("llama")
    part = EncodedPrompt(tokens=5, hidden=6)
    handle = tw.attach(model, part, seed=0)
    t = tensors(model)
    lstm = nn.LSTM(32, 6, 2, bidirectional=True, batch_first=True)
    mlp = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 32))
    names = {"weight_ih": "x", "weight_hh": "h", "bias_ih": "bx", "bias_hh": "bh"}
    for name, p in lstm.named_parameters():
        start, _, rest = name.partition("_l")
        p.copy_(getattr(t, names[start] + rest.replace("_reverse", "_back")))
    for i, layer in enumerate((mlp[0], mlp[2])):
        layer.weight.copy_(getattr(t, f"W{i}"))
        layer.bias.copy_(getattr(t, f"b{i}"))
    torch.testing.assert_close(part.made(t), mlp(lstm(t.E[None])[0])[0])
    assert handle.trainable == 5 * 32 + sum(p.numel() for m in (lstm, mlp) for p in m.parameters())


@torch.no_grad()
def test_the_mlp_is_three_layers() -> None:
    model = tiny("llama")
    part = EncodedPrompt(tokens=5, network="mlp", hidden=6)
    tw.attach(model, part, seed=0)
    t = tensors(model)
    x = torch.relu(nn.functional.linear(t.E, t.W0, t.b0))
    x = torch.relu(nn.functional.linear(x, t.W1, t.b1))
    torch.testing.assert_close(part.made(t), nn.functional.linear(x, t.W2, t.b2))


@torch.no_grad()
def test_each_row_has_the_prompt_of_its_task() -> None:
    model: Any = tiny("llama")
    tw.attach(model, MultitaskPrompt(tokens=4, tasks=3, rank=2), seed=0)
    t, batch = tensors(model), tiny_batch("llama")
    t.U.normal_(), t.V.normal_()
    found = model(**batch, task_ids=torch.tensor([2, 0])).logits
    for row, task in enumerate((2, 0)):
        plain: Any = tiny("llama")
        handle = tw.attach(plain, "prompt_tuning(tokens=4)", seed=0)
        handle.parameters()[0].copy_(t.P * sum(torch.outer(t.U[task, :, i], t.V[task, i]) for i in range(2)))
        torch.testing.assert_close(plain(**batch).logits[row], found[row])
    with pytest.raises(UserError, match="one number below 3 for each of the 2 rows"):
        model(**batch, task_ids=torch.tensor([3, 0]))
    alone = model(**batch, task_ids=torch.tensor([0, 0])).logits
    torch.testing.assert_close(model(**batch).logits, alone)


@torch.no_grad()
@pytest.mark.parametrize("take", ["average", "task", "shared"])
def test_a_target_starts_from_its_source(take: str, tmp_path: Path) -> None:
    source = tw.attach(first := tiny("llama"), MultitaskPrompt(tokens=4, tasks=3), seed=0)
    for p in source.parameters():
        p.normal_()
    source.save(tmp_path)
    s, folder = tensors(first), str(tmp_path)
    options = {"source": folder, "take": take, "source_task": 2}
    model = tiny("llama")
    handle = tw.attach(model, MultitaskPrompt(tokens=4, **options), seed=1)
    t = tensors(model)
    assert torch.equal(t.P, s.P)
    if take == "average":
        torch.testing.assert_close(t.U[0], s.U.mean(0))
        torch.testing.assert_close(t.V[0], s.V.mean(0))
    elif take == "task":
        assert torch.equal(t.U[0], s.U[2]) and torch.equal(t.V[0], s.V[2])
    else:
        assert (t.U - 1).abs().max() < 0.2 and (t.V - 1).abs().max() < 0.2
    handle.save(tmp_path / "target")
    for name, value in tw.restore(tiny("llama"), tmp_path / "target").state().items():
        assert torch.equal(value, handle.state()[name])
    with pytest.raises(UserError, match="tokens, rank and this model need"):
        tw.attach(tiny("llama"), MultitaskPrompt(tokens=5, source=folder))


def test_a_source_without_such_a_prompt_is_refused(tmp_path: Path) -> None:
    tw.attach(tiny("llama"), "lora").save(tmp_path)
    with pytest.raises(UserError, match="holds no multitask prompt"):
        tw.attach(tiny("llama"), MultitaskPrompt(source=str(tmp_path)))
