"""LoKr with PEFT's tensors gives PEFT's logits and gradients, whichever factors are whole."""

from __future__ import annotations

import pytest

from tunewise.delta.lokr import LoKr, factors

from .peft_pair import SITES, TARGETS, agree, peft

NAMES = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")
WHERE = {n: (lambda layer, n=n: getattr(layer, f"lokr_{n}")["default"]) for n in NAMES}


@pytest.mark.parametrize("length", [3, 40])
@pytest.mark.parametrize(("rank", "both", "factor"), [(8, False, -1), (2, True, -1), (1, True, 16)])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_same_numbers(name: str, rank: int, both: bool, factor: int, length: int) -> None:
    config = peft.LoKrConfig(
        r=rank, alpha=5, decompose_both=both, decompose_factor=factor, target_modules=TARGETS[name]
    )
    delta = LoKr(rank=rank, alpha=5, factor=factor, decompose_both=both, sites=SITES[name])
    agree(name, delta, config, WHERE, length=length)  # type: ignore[arg-type]


def test_the_same_factors() -> None:
    from peft.tuners.lokr.layer import factorization

    for size in [*range(1, 200), 384, 768, 2560, 4096, 11008]:
        for factor in (-1, 1, 2, 3, 7, 8, 16, 100):
            assert factors(size, factor) == factorization(size, factor), (size, factor)
