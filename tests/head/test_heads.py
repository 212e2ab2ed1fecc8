"""Heads on tiny models: what they train, what they read, what they refuse."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import tiny, tiny_batch
from tunewise.core.errors import UserError
from tunewise.core.handle import attach, restore
from tunewise.core.part import build_part, describe_part
from tunewise.head import ClassHead, LMHead, PooledHead
from tunewise.head.pooled import pool

POOLER = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
HEAD = {"classifier.weight", "classifier.bias"}


def task(labels: list[str] | None = None) -> Any:
    return SimpleNamespace(name="classification" if labels else "regression", labels=labels)


def batch(inputs: dict[str, Tensor]) -> Any:
    size = len(next(iter(inputs.values())))
    return SimpleNamespace(inputs=inputs, ids=[f"row{i}" for i in range(size)])


def read(handle: Any, inputs: dict[str, Tensor]) -> Tensor:
    t = next(t for _, _, t in handle.sites if t.part.slot == "head")
    return t.part.logits(t.cast(torch.float32), handle.model(**inputs), batch(inputs))


def text(name: str) -> dict[str, Tensor]:
    return {k: v for k, v in tiny_batch(name).items() if k != "labels"}


def test_class_head_trains_classifier_and_pooler() -> None:
    model = tiny("bert")
    assert set(ClassHead().existing(model)) == HEAD | POOLER
    assert set(ClassHead(pooler=False).existing(model)) == HEAD
    assert set(ClassHead().existing(model).values()) == {"head"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("distilbert", {"pre_classifier", "classifier"}),
        ("deberta", {"pooler", "classifier"}),
        ("modernbert", {"head", "classifier"}),
        ("albert", {"albert", "classifier"}),
        ("vit", {"classifier"}),
        ("dinov2", {"classifier"}),
    ],
)
def test_class_head_of_other_models(name: str, expected: set[str]) -> None:
    names = ClassHead().existing(tiny(name))
    assert {n.split(".")[0] for n in names} == expected
    assert all("pooler" in n for n in names if n.startswith("albert."))


def test_class_head_of_a_plain_module() -> None:
    model = nn.Sequential()
    model.add_module("body", nn.Linear(3, 4))
    model.add_module("fc", nn.Linear(4, 2))
    assert set(ClassHead().existing(model)) == {"fc.weight", "fc.bias"}
    assert set(ClassHead(modules="body").existing(model)) == {"body.weight", "body.bias"}
    with pytest.raises(UserError, match='no module "bodi"; did you mean "body"'):
        ClassHead(modules=["fc", "bodi"]).existing(model)


@pytest.mark.parametrize("name", ["gpt2", "roberta", "llama", "t5"])
def test_class_head_refuses_language_models(name: str) -> None:
    with pytest.raises(UserError, match="has no classification head"):
        ClassHead().existing(tiny(name))
    with pytest.raises(UserError, match="has no classification head"):
        ClassHead().existing(tiny(name).base_model)  # type: ignore[arg-type]


def test_class_head_checks_the_number_of_classes() -> None:
    ClassHead().setup(task(["a", "b"]), None, tiny("bert"))
    with pytest.raises(UserError, match="gives 2 classes and the task has 3"):
        ClassHead().setup(task(["a", "b", "c"]), None, tiny("bert"))
    with pytest.raises(UserError, match="gives 2 classes and the task has 1"):
        ClassHead().setup(task(), None, tiny("bert"))


def test_class_head_attached() -> None:
    model, inputs = tiny("bert"), text("bert")
    before = model(**inputs).logits
    handle = attach(model, ClassHead())
    assert set(handle.tensors()) == HEAD | POOLER
    assert {i.tag for i in handle.tensors().values()} == {"head"}
    assert handle.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    logits = read(handle, inputs)
    assert torch.equal(logits, before)
    logits.sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == HEAD | POOLER
    handle.detach()
    assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("how", ["mean", "first", "last"])
def test_pool_does_not_see_padding(how: str) -> None:
    hidden = torch.randn(2, 3, 4)
    right = torch.cat([hidden, torch.full((2, 2, 4), 9.0)], 1)
    left = torch.cat([torch.full((2, 2, 4), 9.0), hidden], 1)
    ones, zeros = torch.ones(2, 3).bool(), torch.zeros(2, 2).bool()
    expected = {"mean": hidden.mean(1), "first": hidden[:, 0], "last": hidden[:, -1]}[how]
    assert torch.allclose(pool(right, torch.cat([ones, zeros], 1), how), expected)
    assert torch.allclose(pool(left, torch.cat([zeros, ones], 1), how), expected)
    assert torch.equal(pool(hidden, ~ones, how), torch.zeros(2, 4))


@pytest.mark.parametrize("how", ["mean", "first", "last"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "dinov2", "mamba"])
def test_pooled_head_starts_at_zero_and_learns(name: str, how: str) -> None:
    whole = tiny(name)
    model = whole.get_submodule(whole.base_model_prefix)
    inputs = text(name)
    head = PooledHead(pooling=how)  # type: ignore[arg-type]
    head.setup(task(["a", "b", "c"]), None, model)
    handle = attach(model, head)
    part, site = handle.sites[0][2].part, handle.sites[0][1]
    assert set(handle.tensors()) == {"pooled_head.weight", "pooled_head.bias"}
    assert handle.trainable == part.formula(site) == 3 * 33
    assert {i.tag for i in handle.tensors().values()} == {"head"}
    logits = read(handle, inputs)
    assert logits.shape == (2, 3) and logits.dtype == torch.float32 and not logits.any()
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1])).backward()
    assert all(p.grad is not None and p.grad.any() for p in handle.parameters())


def test_pooled_head_is_saved_and_restored(tmp_path: Any) -> None:
    head = PooledHead(pooling="first")
    head.setup(task(), None, tiny("bert").get_submodule("bert"))
    assert head.outputs == 1
    handle = attach(tiny("bert").get_submodule("bert"), head)
    with torch.no_grad():
        for p in handle.parameters():
            p.normal_()
    again = restore(tiny("bert").get_submodule("bert"), handle.save(tmp_path))
    assert torch.equal(read(handle, text("bert")), read(again, text("bert")))


def test_pooled_head_with_soft_prompts_in_front() -> None:
    head = PooledHead(outputs=2)
    hidden = torch.randn(2, 5, 4)
    t = SimpleNamespace(weight=torch.randn(2, 4), bias=torch.randn(2))
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    longer = head.logits(t, SimpleNamespace(last_hidden_state=hidden), batch({"attention_mask": mask}))
    plain = head.logits(t, SimpleNamespace(last_hidden_state=hidden[:, 2:]), batch({"attention_mask": mask}))
    assert torch.equal(longer, plain)


def test_pooled_head_reads_convolutional_maps() -> None:
    t = SimpleNamespace(weight=torch.eye(4), bias=torch.zeros(4))
    maps = torch.randn(2, 4, 3, 3)
    found = PooledHead(outputs=4).logits(
        t, SimpleNamespace(last_hidden_state=maps), batch({"pixel_values": maps})
    )
    assert torch.allclose(found, maps.mean((2, 3)), atol=1e-6)


def test_pooled_head_refusals() -> None:
    with pytest.raises(UserError, match="encoder-decoder"):
        PooledHead().setup(task(["a", "b"]), None, tiny("t5"))
    with pytest.raises(UserError, match="gives no hidden_size"):
        PooledHead().setup(task(["a", "b"]), None, nn.Linear(2, 2))
    with pytest.raises(UserError, match="outputs=N"):
        attach(tiny("bert"), PooledHead())
    with pytest.raises(UserError, match="pooling"):
        PooledHead(pooling="max")  # type: ignore[arg-type]


def test_lm_head() -> None:
    LMHead().setup(task(), None, tiny("gpt2"))
    with pytest.raises(UserError, match="no output layer over words"):
        LMHead().setup(task(), None, tiny("bert"))
    model, inputs = tiny("gpt2"), text("gpt2")
    before = model(**inputs).logits
    handle = attach(model, LMHead())
    assert handle.trainable == 0
    assert torch.equal(read(handle, inputs), before)


@pytest.mark.parametrize("head", [ClassHead(pooler=False), PooledHead(pooling="last", outputs=3), LMHead()])
def test_description(head: Any) -> None:
    assert build_part(describe_part(head)) == head
