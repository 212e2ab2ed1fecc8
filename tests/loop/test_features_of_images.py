"""Frozen states of images are served to VQT and HST: equal answers, and blocks that are not called again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models import tiny
from tunewise.core.handle import attach
from tunewise.core.method import get_method
from tunewise.core.run import Run
from tunewise.data import Columns
from tunewise.loop.features import frozen_features
from tunewise.task import ImageClassification
from tunewise.task.image import PIXELS


@pytest.mark.parametrize("method", ["vqt", "hst"])
@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_a_second_pass_calls_no_block_and_answers_the_same(name: str, method: str) -> None:
    model: Any = tiny(name)
    handle = attach(model, get_method(method)(), seed=0)
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    task = ImageClassification(Columns(("image",), "label", "image_classification"))
    task.labels = ["a", "b"]
    rows = [{"id": str(i), PIXELS: torch.randn(3, 16, 16), "labels": i % 2, "length": 1} for i in range(6)]
    run = Run(handle, data={"train": rows}, task=task)
    batch = run.collate(rows)
    with torch.no_grad():
        wanted, _ = run.forward(batch)
        with frozen_features(run, {}, limit_bytes=2**20) as features:
            assert features.blocks == 2, features.reason
            first, _ = run.forward(batch)
            computed = features.computed
            second, _ = run.forward(batch)
    assert torch.equal(second, first) and torch.allclose(first, wanted, atol=1e-5)
    assert features.computed == computed and features.served >= 6
