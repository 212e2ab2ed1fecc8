"""min_{W, b} sum_i loss(W h_i + b, y_i) + |W|^2 / (2 C): a linear head solved exactly on frozen features."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tunewise.core.errors import UserError
from tunewise.core.part import Part
from tunewise.core.run import Run
from tunewise.head.base import sequence_mask
from tunewise.head.pooled import PooledHead, pool

__all__ = ["FitHead"]


class FitHead(Part):
    """Logistic regression (ridge for numbers) on pooled features h_i of the frozen backbone, one pass over
    the rows.

    Features are standardised with the training rows' mean and deviation, which are folded into W and b
    afterwards. C is the candidate with the best validation metric (without validation rows: 1). Convex, so no
    seed and no learning rate matter. Raises `UserError` when anything but a PooledHead is to be trained.
    """

    slot: ClassVar[str] = "loop"
    candidates: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0, 10.0)

    def run(self, run: Run) -> None:
        """Fits the head and puts W and b in place."""
        heads = [(t.part, t) for _, _, t in run.handle.sites if isinstance(t.part, PooledHead)]
        if len(heads) != 1 or run.recipe["delta"]:
            raise UserError(
                "FitHead solves a PooledHead on a frozen backbone: it takes no delta and no other head."
            )
        head, t = heads[0]
        weights: Any = t.weight
        biases: Any = t.bias
        x, y = self._features(run, head, "train")
        valid = self._features(run, head, "valid") if "valid" in run.streams.data else None
        mean, deviation = x.mean(0), x.std(0) + 1e-6
        best: tuple[float, float, Any] | None = None
        for c in self.candidates if valid is not None else (1.0,):
            fitted = self._fit(run, (x - mean) / deviation, y, c)
            score = fitted.score((valid[0] - mean) / deviation, valid[1]) if valid is not None else 0.0
            run.log(C=c, score=float(score))
            if best is None or score > best[0]:
                best = (float(score), c, fitted)
        assert best is not None
        weight, bias = _weights(best[2], head.outputs or 1)
        weight = weight / deviation
        run.metrics["C"] = best[1]
        with torch.no_grad():
            weights.copy_(torch.from_numpy(weight))
            biases.copy_(torch.from_numpy(bias - weight @ mean))
        run.fire("finish")

    def _fit(self, run: Run, x: np.ndarray, y: np.ndarray, c: float) -> Any:
        from sklearn.linear_model import LogisticRegression, Ridge

        if run.task.name == "regression":
            return Ridge(alpha=1.0 / c).fit(x, y)
        return LogisticRegression(C=c, max_iter=2000).fit(x, y)

    @torch.no_grad()
    def _features(self, run: Run, head: PooledHead, name: str) -> tuple[np.ndarray, np.ndarray]:
        examples = sorted(run.streams.data[name], key=lambda e: int(e["length"]))
        run.model.eval()
        xs: list[Tensor] = []
        ys: list[Tensor] = []
        for start in range(0, len(examples), 64):
            batch = run.collate(examples[start : start + 64])
            hidden = run.outputs(batch).last_hidden_state.float()
            hidden = hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden
            mask = sequence_mask(batch.inputs, hidden.shape[:2], hidden.device)
            xs.append(pool(hidden, mask, head.pooling).cpu())
            ys.append(batch.labels.cpu())
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
