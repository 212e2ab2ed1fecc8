"""VeRA draws PEFT's projections from the same seed, and gives its logits and gradients."""

from __future__ import annotations

import pytest
import torch

from .peft_pair import SITES, TARGETS, agree, peft, theirs

WHERE = {n: (lambda layer, n=n: getattr(layer, f"vera_lambda_{n}")["default"]) for n in ("d", "b")}


def config(name: str) -> object:
    return peft.VeraConfig(
        r=6, projection_prng_key=3, target_modules=TARGETS[name], fan_in_fan_out=name == "gpt2"
    )


@pytest.mark.parametrize("length", [3, 40])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_the_same_numbers_without_a_saved_projection(name: str, length: int) -> None:
    method = f'vera(rank=6, seed=3, sites="{SITES[name]}")'
    handle = agree(name, method, config(name), WHERE, length=length)  # type: ignore[arg-type]
    other = theirs(name, config(name)).base_model
    shared = handle.owned["vera"]
    assert torch.equal(shared.A, other.vera_A["default"])
    assert torch.equal(shared.B, other.vera_B["default"])
    assert not [n for n in handle.state() if n.startswith("shared")]
