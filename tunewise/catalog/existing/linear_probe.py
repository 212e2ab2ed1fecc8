"""Linear probe: logistic (or ridge) regression on frozen pooled features, solved exactly."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.head.pooled import PooledHead
from tunewise.loop.probe import FitHead


@method("linear_probe", title="Linear probe", lr=())
def linear_probe(pooling: str = "mean") -> Recipe:
    """min_{W, b} sum_i loss(W h(x_i) + b, y_i) + |W|^2 / (2 C), h frozen, C chosen on the validation rows."""
    return Recipe(head=PooledHead(pooling=pooling), loop=FitHead())  # type: ignore[arg-type]
