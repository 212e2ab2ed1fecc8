"""Same tensors, same numbers: MiSS in its three variants against PEFT."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from tests.models import tiny, tiny_batch
from tunewise.catalog.lowrank.miss import miss
from tunewise.core.handle import attach

peft = pytest.importorskip("peft")

# PEFT's options and ours; a rank of 5 leaves a last block of 2 of the 32 inputs
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "balance": ({"r": 8, "init_weights": True}, {"rank": 8}),
    "balance, padded": ({"r": 5, "init_weights": True}, {"rank": 5}),
    "mini": ({"r": 8, "init_weights": "mini", "mini_r": 4}, {"rank": 8, "variant": "mini", "mini": 4}),
    "bat": ({"r": 8, "init_weights": "bat"}, {"rank": 8, "variant": "bat"}),
}


def _theirs(name: str, targets: list[str], options: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.MissConfig(target_modules=targets, **options)
        return peft.get_peft_model(tiny(name), config).eval()


@pytest.mark.parametrize(
    ("name", "targets", "sites"),
    [("bert", ["query", "value"], "query | value"), ("llama", ["v_proj", "up_proj"], "value | up")],
)
@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_pefts(case: str, name: str, targets: list[str], sites: str) -> None:
    their_options, our_options = CASES[case]
    theirs = _theirs(name, targets, their_options)
    ours = tiny(name)
    handle = attach(ours, miss(sites=sites, **our_options))
    blocks = {
        n.partition("base_model.model.")[2].split(".miss_block")[0]: p
        for n, p in theirs.named_parameters()
        if "miss_block" in n
    }
    mine = {i.site: i.tensor for i in handle.tensors().values()}
    assert mine.keys() == blocks.keys() and mine
    make = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for site, p in blocks.items():
            p.copy_(torch.randn(p.shape, generator=make) * 0.5)
            mine[site].copy_(p)
    batch = tiny_batch(name)
    plain = tiny(name)(**batch).logits
    found, wanted = ours(**batch), theirs(**batch)
    assert (wanted.logits - plain).abs().max() > 1e-3
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-5, atol=1e-5)
    found.loss.backward()
    wanted.loss.backward()
    for site, p in blocks.items():
        assert bool(p.grad.any())
        torch.testing.assert_close(mine[site].grad, p.grad, rtol=1e-5, atol=1e-5)
