"""Factors of low-rank deltas at fused rows and at weights stored `[in, out]` are the whole change there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.delta.small import attached
from tests.models import tiny
from tunewise.delta.block_lora import BlockLoRA
from tunewise.delta.comp_lora import CompLoRA
from tunewise.delta.deactivated import DeactivatedLoRA
from tunewise.delta.hydra import Hydra
from tunewise.delta.miss import MiSS
from tunewise.delta.nola import NOLA

PARTS = [
    BlockLoRA(rank=4, blocks=2, sites="query | down"),
    CompLoRA(rank=2, sites="query | down"),
    DeactivatedLoRA(rank=2, sites="query | down"),
    Hydra(rank=2, sequential=2, sites="query | down"),
    MiSS(rank=5, sites="query | down"),
    MiSS(rank=8, mini=4, sites="query | down"),
    NOLA(rank=2, basis=4, sites="query | down"),
]


@pytest.mark.parametrize("part", PARTS, ids=lambda p: type(p).__name__)
def test_components_are_the_whole_change(part: Any) -> None:
    _, handle = attached(part, tiny("gpt2"), move=0.3)
    changes = handle.materialize()
    assert len(handle.sites) == 4
    for _, site, t in handle.sites:
        b, a = t.part.components(t)  # type: ignore[attr-defined]
        change = changes[site.name] if site.rows is None else changes[site.name][site.rows]
        assert float(change.abs().max()) > 0.01
        torch.testing.assert_close((b @ a).detach(), change, rtol=1e-4, atol=1e-5)
