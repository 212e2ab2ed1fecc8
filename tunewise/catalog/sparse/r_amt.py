"""R-AMT: regularised mask tuning."""

from __future__ import annotations

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.mask import ThresholdMask
from tunewise.objective.mask_norm import GradientDropout, MaskNorm
from tunewise.objective.task_loss import TaskLoss


@method("r_amt", title="Regularised mask tuning", arxiv="2307.15049", lr=(8e-5, 1e-3, 5e-3))
def r_amt(
    threshold: float = 5e-3,
    penalty: float = 1e-4,
    dropout: float = 1.0,
    sites: str | list[str] = "attention",
) -> Recipe:
    """W' = 1[R > threshold] * W, R from 0.01, straight-through; + penalty sum |R|_2.

    Gradients that would leave the answers at the start are dropped at random (see GradientDropout); dropout=0 leaves
    that out, which halves the time of a step.
    """
    objectives = [TaskLoss(), MaskNorm(penalty)]
    more = [GradientDropout(dropout)] if dropout else []
    return Recipe(delta=ThresholdMask(threshold, sites=sites), objective=[*objectives, *more])
