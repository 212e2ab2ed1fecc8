"""The head of images: the model's own classifier, or a new one on a bare encoder."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.models import tiny, tiny_batch
from tunewise.core.handle import attach
from tunewise.core.recipe import Recipe
from tunewise.head import GivenHead, ImageHead

TASK = SimpleNamespace(name="image_classification", labels=["a", "b"])


def put(model: Any, **options: Any) -> tuple[Any, Any, Any]:
    """(handle, the head's tensors, the head)."""
    recipe = Recipe(head=ImageHead(**options))
    recipe["head"][0].setup(TASK, None, model)  # type: ignore[attr-defined]
    handle = attach(model, recipe, seed=0)
    t = next(t for _, _, t in handle.sites)
    return handle, t, handle.recipe["head"][0]


def answer(model: Any, t: Any, head: Any, name: str = "vit") -> torch.Tensor:
    batch = SimpleNamespace(inputs={"pixel_values": tiny_batch(name)["pixel_values"]})
    with torch.no_grad():
        return head.logits(t, model(**batch.inputs), batch)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_with_a_classifier_it_is_the_models(name: str) -> None:
    model = tiny(name)
    handle, t, head = put(model)
    assert set(handle.tensors()) == {"classifier.weight", "classifier.bias"} and head.own
    found = answer(model, t, head, name)
    assert torch.equal(found, model(pixel_values=tiny_batch(name)["pixel_values"]).logits)
    assert head.auto_for(model.config) == "image_classification"


@pytest.mark.parametrize(("pooling", "width"), [("both", 64), ("first", 32), ("mean", 32)])
@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_a_bare_encoder_gets_a_new_one(name: str, pooling: str, width: int) -> None:
    model: Any = tiny(name).base_model
    handle, t, head = put(model, pooling=pooling)
    assert not head.own and handle.trainable == 2 * (width + 1) == head.formula(SimpleNamespace(module=model))
    assert torch.equal(answer(model, t, head, name), torch.zeros(2, 2))
    with torch.no_grad():
        t.weight.normal_()
        states = model(pixel_values=tiny_batch(name)["pixel_values"]).last_hidden_state
    first, patches = states[:, 0], states[:, 1:].mean(1)
    wanted = {"both": torch.cat([first, patches], 1), "first": first, "mean": patches}[pooling] @ t.weight.T
    assert torch.allclose(answer(model, t, head, name), wanted, atol=1e-6)


def test_what_stands_before_the_patches_is_no_patch() -> None:
    model: Any = tiny("vit").base_model
    _, t, head = put(model, pooling="mean")
    with torch.no_grad():
        t.weight.normal_()
    batch = SimpleNamespace(inputs={"pixel_values": torch.zeros(2, 3, 16, 16)})
    states = torch.randn(2, 1 + 3 + 4, 32)
    wanted = states[:, 4:].mean(1) @ t.weight.T
    assert torch.allclose(head.logits(t, states, batch), wanted, atol=1e-6)


def test_maps_of_convolutions_are_averaged() -> None:
    from transformers import ResNetConfig, ResNetModel

    options = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}
    model = ResNetModel(ResNetConfig(**options)).eval()
    handle, t, head = put(model)
    assert handle.trainable == 2 * (12 + 1)
    with torch.no_grad():
        t.weight.normal_()
    batch = SimpleNamespace(inputs={"pixel_values": torch.randn(2, 3, 32, 32)})
    outputs = model(**batch.inputs)
    wanted = outputs.last_hidden_state.mean((2, 3)) @ t.weight.T
    assert torch.allclose(head.logits(t, outputs, batch), wanted, atol=1e-5)


def test_the_given_head_trains_nothing() -> None:
    model = tiny("vit")
    handle = attach(model, Recipe(head=GivenHead()) + Recipe.of(_small()), seed=0)
    assert all(name.startswith("layers") or "lo_ra" in name or "lora" in name for name in handle.tensors())


def _small() -> Any:
    from tunewise.delta.lora import LoRA

    return LoRA(2)
