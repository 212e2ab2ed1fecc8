"""Metrics of the current model on encoded rows; nothing learns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tunewise.core.run import Run

__all__ = ["evaluate", "predict_rows"]


@torch.no_grad()
def predict_rows(
    run: Run, examples: Sequence[dict[str, Any]], tick: Any = None
) -> tuple[list[Any], dict[str, float]]:
    """(predictions in the order of `examples`, {"loss": mean over supervised units}); batches hold like
    lengths.
    """
    size = getattr(run.settings, "eval_batch_size", 64)
    mode = run.model.training
    run.model.eval()
    order = sorted(range(len(examples)), key=lambda i: int(examples[i].get("length", 0)))
    predictions: list[Any] = [None] * len(examples)
    total, units = 0.0, 0.0
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        batch = run.collate([examples[i] for i in rows])
        logits, _ = run.forward(batch)
        if batch.labels is not None:
            total += float(run.task.losses(logits, batch).sum())
            units += float(batch.units.sum())
        for i, value in zip(rows, run.task.predict(logits, batch), strict=True):
            predictions[i] = value
        if tick is not None:
            tick(len(rows))
    run.model.train(mode)
    return predictions, {"loss": total / units} if units else {}


def evaluate(run: Run, examples: Sequence[dict[str, Any]], tick: Any = None) -> dict[str, float]:
    """The task's metrics and the mean loss, as a flat dict."""
    predictions, losses = predict_rows(run, examples, tick)
    return {**losses, **run.task.metrics(predictions, examples)}
