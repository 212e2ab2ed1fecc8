"""VQT: learnt queries ask every block of a frozen encoder, a wide linear layer reads their answers."""

from typing import Any

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.vqt import VisualQueries
from tunewise.head import ClassHead
from tunewise.objective.column_norm import ColumnNorm
from tunewise.objective.task_loss import TaskLoss


@method("vqt", title="Visual query tuning (VQT)", arxiv="2212.03220", lr=(1e-3, 3e-3, 1e-2))
def vqt(
    queries: int = 5, dropout: float = 0.0, normalize: bool = True, keep: float = 1.0, penalty: float = 1e-4
) -> Recipe:
    """y' = y + W [Z_1 .. Z_L], Z_l = block_l(P_l; K, V of X_{l-1}), X untouched."""
    more: dict[str, Any] = {}
    if keep < 1:  # columns are chosen by their norm, which is pulled down first
        more["objective"] = [TaskLoss(), ColumnNorm(weight=penalty)]
    delta = VisualQueries(queries=queries, dropout=dropout, normalize=normalize, keep=keep)
    return Recipe(delta=delta, defaults={"head": ClassHead()}, **more)
