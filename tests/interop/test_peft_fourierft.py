"""FourierFT has PEFT's places for the same seed, its logits and its gradients."""

from __future__ import annotations

import pytest
import torch

from .peft_pair import SITES, TARGETS, agree, peft, theirs

WHERE = {"coefficients": lambda layer: layer.fourierft_spectrum["default"]}


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("seed", [777, 5])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_the_same_numbers(name: str, seed: int, plain: bool) -> None:
    config = peft.FourierFTConfig(
        n_frequency=50,
        scaling=200.0,
        random_loc_seed=seed,
        target_modules=TARGETS[name],
        fan_in_fan_out=name == "gpt2",
    )
    method = f'fourierft(frequencies=50, scale=200.0, seed={seed}, sites="{SITES[name]}")'
    handle = agree(name, method, config, WHERE, plain=plain)
    layer = theirs(name, config).get_submodule(f"base_model.model.{handle.sites[0][1].name}")
    shape = f"places_{layer.out_features}x{layer.in_features}"
    assert torch.equal(getattr(handle.owned["fourierft"], shape), layer.indices["default"])
