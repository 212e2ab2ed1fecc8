"""Head only: the backbone is frozen, the task's head learns."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.head import ClassHead


@method("head_only", title="Head-only tuning", lr=(3e-4, 3e-3, 1e-2))
def head_only(pooler: bool = True) -> Recipe:
    """p(y | x) = softmax(W_head h(x) + b_head), h frozen."""
    return Recipe(head=ClassHead(pooler=pooler))
