"""IA3 with PEFT's vectors, less one, gives PEFT's logits and gradients."""

from __future__ import annotations

import pytest

from .peft_pair import agree, peft

DOWN = ["layer.0.output.dense", "layer.1.output.dense"]
CASES = {
    "bert": (["key", "value", *DOWN], DOWN),
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_numbers(name: str) -> None:
    targets, inner = CASES[name]
    config = peft.IA3Config(target_modules=targets, feedforward_modules=inner, fan_in_fan_out=name == "gpt2")
    method = 'ia3(sites="query | key | value")' if name == "gpt2" else "ia3"
    agree(name, method, config, {"g": lambda layer: layer.ia3_l["default"]}, shift=-1.0)
