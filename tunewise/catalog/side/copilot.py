"""Transformer Copilot: a second decoder learns the mistakes of the model and corrects them at inference."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.lora import LoRA
from tunewise.head.copilot import Copilot
from tunewise.objective.mistakes import MistakeLoss
from tunewise.objective.task_loss import TaskLoss


@method(
    "copilot",
    title="Transformer Copilot",
    arxiv="2505.16270",
    lr=(1e-4, 1e-3, 5e-3),
    unverified="No code is public: encoder-decoders use the decoder-only layer scheme, memory states are normed, and "
    "p~ stays above a hundredth of p, so that it has a likelihood.",
)
def copilot(
    strength: float = 1.0,
    layers: int = 2,
    width: int | None = None,
    rows: int = 8,
    capacity: int = 64,
    top: int = 32,
) -> Recipe:
    """p~_i = p_i + strength f_i, f from a decoder trained by |f_i - (onehot_i - p_i)|; `copilot + dora`: any Pilot."""
    return Recipe(
        head=Copilot(strength=strength, layers=layers, width=width),
        objective=[TaskLoss(), MistakeLoss(rows=rows, capacity=capacity, top=top)],
        defaults={"delta": LoRA()},
    )
