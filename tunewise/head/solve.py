"""min_{W, b} sum_i loss(W h_i + b, y_i) + |W|^2 / (2 C): a linear head solved exactly on features as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from tunewise.core.run import Run

__all__ = ["CANDIDATES", "solve"]

CANDIDATES = (0.001, 0.01, 0.1, 1.0, 10.0)
ROWS = 64
"""In one pass."""


def solve(run: Run, head: Any, t: Any, candidates: Sequence[float] = CANDIDATES) -> float:
    """Puts the W and b of least loss on the training rows into t of a PooledHead; gives C.

    Logistic regression (ridge for numbers) on the features that `head.latent` gives, in one pass over the rows, with
    whatever is attached to the model. Features are standardised with the training rows' mean and deviation, which
    are folded into W and b afterwards. C is the candidate with the best validation metric (without validation rows:
    1). Convex, so no seed and no learning rate matter.
    """
    x, y = _features(run, head, "train")
    valid = _features(run, head, "valid") if "valid" in run.streams.data else None
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    best: tuple[float, float, Any] | None = None
    for c in candidates if valid is not None else (1.0,):
        fitted = _fit(run, (x - mean) / deviation, y, c)
        score = fitted.score((valid[0] - mean) / deviation, valid[1]) if valid is not None else 0.0
        run.log(C=c, score=float(score))
        if best is None or score > best[0]:
            best = (float(score), c, fitted)
    assert best is not None
    weight, bias = _weights(best[2], head.outputs or 1)
    weight = weight / deviation
    with torch.no_grad():
        t.weight.copy_(torch.from_numpy(weight))
        t.bias.copy_(torch.from_numpy(bias - weight @ mean))
    return best[1]


def _fit(run: Run, x: np.ndarray, y: np.ndarray, c: float) -> Any:
    from sklearn.linear_model import LogisticRegression, Ridge

    if run.task.name == "regression":
        return Ridge(alpha=1.0 / c).fit(x, y)
    return LogisticRegression(C=c, max_iter=2000).fit(x, y)


@torch.no_grad()
def _features(run: Run, head: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    examples = sorted(run.streams.data[name], key=lambda e: int(e["length"]))
    was = {module: module.training for module in run.model.modules()}
    run.model.eval()
    xs: list[Tensor] = []
    ys: list[Tensor] = []
    for start in range(0, len(examples), ROWS):
        batch = run.collate(examples[start : start + ROWS])
        xs.append(head.latent(run.outputs(batch), batch).cpu())
        ys.append(batch.labels.cpu())
    for module, mode in was.items():
        module.training = mode
    return torch.cat(xs).double().numpy(), torch.cat(ys).numpy()


def _weights(fitted: Any, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """W `[outputs, width]` and b; two-class logistic regression has one row, which is the difference of two."""
    coefficients = np.atleast_2d(fitted.coef_)
    intercept = np.atleast_1d(fitted.intercept_)
    if outputs == 2 and len(coefficients) == 1:
        return np.concatenate([-coefficients, coefficients]) / 2, np.concatenate([-intercept, intercept]) / 2
    if len(coefficients) != outputs:
        full, offset = np.zeros((outputs, coefficients.shape[1])), np.full(outputs, -1e4)
        for row, label in enumerate(fitted.classes_):
            full[int(label)], offset[int(label)] = coefficients[row], intercept[row]
        return full, offset
    return coefficients, intercept
