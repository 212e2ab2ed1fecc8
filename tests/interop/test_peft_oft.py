"""OFT with PEFT's tensors gives PEFT's logits and gradients: Neumann series and exact map, shared blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models import tiny
from tunewise.core.handle import attach
from tunewise.core.run import Run
from tunewise.delta.oft import OFT

from .peft_pair import SITES, TARGETS, agree, peft, theirs

WHERE = {"Q": lambda layer: layer.oft_R["default"].weight}


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("terms", [0, 5, 7])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_same_numbers(name: str, terms: int, share: bool) -> None:
    config = peft.OFTConfig(
        oft_block_size=8,
        target_modules=TARGETS[name],
        use_cayley_neumann=terms > 0,
        num_cayley_neumann_terms=terms or 5,
        block_share=share,
    )
    agree(name, OFT(block_size=8, terms=terms, block_share=share, sites=SITES[name]), config, WHERE)


def test_the_constrained_form_has_pefts_radius() -> None:
    options: dict[str, Any] = {"oft_block_size": 8, "target_modules": ["query"], "coft": True, "eps": 1e-2}
    other = theirs("bert", peft.OFTConfig(**options))
    handle = attach(tiny("bert"), 'oft(block_size=8, coft=True, eps=1e-2, sites="query")')
    layers = [m for n, m in other.named_modules() if n.endswith("query")]
    with torch.no_grad():
        for (_, _, t), layer in zip(handle.sites, layers, strict=True):
            t.get_parameter("Q").copy_(layer.oft_R["default"].weight)
            layer(torch.zeros(1, 32))  # PEFT projects in the forward pass
        before = [t.get_parameter("Q").clone() for _, _, t in handle.sites]
        handle.deltas[0][1].after_step(Run(handle))
    for (_, _, t), layer, old in zip(handle.sites, layers, before, strict=True):
        assert not torch.allclose(old, t.get_parameter("Q"))
        torch.testing.assert_close(t.get_parameter("Q"), layer.oft_R["default"].weight, rtol=1e-5, atol=1e-8)
