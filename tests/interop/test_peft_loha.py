"""LoHa with PEFT's tensors gives PEFT's logits and gradients."""

from __future__ import annotations

import pytest

from .peft_pair import SITES, TARGETS, agree, peft

WHERE = {
    n: (lambda layer, n=n: getattr(layer, f"hada_{n}")["default"]) for n in ("w1_a", "w1_b", "w2_a", "w2_b")
}


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_same_numbers(name: str, plain: bool) -> None:
    config = peft.LoHaConfig(r=3, alpha=7, target_modules=TARGETS[name])
    agree(name, f'loha(rank=3, alpha=7, sites="{SITES[name]}")', config, WHERE, plain=plain)  # type: ignore[arg-type]
