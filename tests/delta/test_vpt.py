"""Deep prompts in a ViT: those of the paper, prepended to the patches of every block and dropped again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models import tiny, tiny_batch
from tunewise.core.handle import attach
from tunewise.core.method import get_method


def blocks(model: Any) -> list[Any]:
    return [m for m in model.modules() if type(m).__name__ in ("ViTLayer", "Dinov2Layer")]


def by_hand(model: Any, prompts: list[torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """The class token after all blocks and the last norm."""
    base = model.base_model
    x = base.embeddings(pixels)
    for block, prompt in zip(blocks(model), prompts, strict=True):
        n = prompt.shape[0]
        x = block(torch.cat([prompt.expand(len(x), -1, -1), x], 1))[:, n:]
    return base.layernorm(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_answers_and_gradients_are_those_of_prompts_in_the_sequence(name: str) -> None:
    pixels = tiny_batch(name)["pixel_values"]
    model: Any = tiny(name)
    handle = attach(model, get_method("vpt")(tokens=3), seed=0)
    found = model.base_model(pixel_values=pixels).last_hidden_state
    found.square().sum().backward()
    mine: list[Any] = [t.P for _, _, t in handle.sites]
    prompts = [p.detach().clone().requires_grad_() for p in mine]
    plain: Any = tiny(name)
    wanted = by_hand(plain, prompts, pixels)
    wanted.square().sum().backward()
    assert torch.allclose(found, wanted, atol=1e-5)
    for one, two in zip(mine, prompts, strict=True):
        assert torch.allclose(one.grad, two.grad, atol=1e-4)


def test_prompts_start_in_the_papers_interval() -> None:
    model: Any = tiny("vit")
    handle = attach(model, get_method("vpt")(tokens=50), seed=0)
    bound = (6 / (3 * 8**2 + 32)) ** 0.5
    for _, _, t in handle.sites:
        largest = float(t.P.detach().abs().max())  # type: ignore[operator]
        assert 0.9 * bound < largest <= bound
    assert handle.trainable == 2 * 50 * 32


def test_the_shape_of_the_states_stays() -> None:
    model: Any = tiny("dinov2")
    attach(model, "vpt", seed=0)
    assert model.base_model(pixel_values=torch.zeros(1, 3, 16, 16)).last_hidden_state.shape == (1, 5, 32)
