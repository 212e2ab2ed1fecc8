"""SMoE-Dropout: a frozen random router, and more experts the longer the run."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.existing import ExistingWeights
from tunewise.delta.hidden_experts import SMoEDropout
from tunewise.diagnose.routing import RouterLog


@method(
    "smoe_dropout",
    title="Sparse mixture of experts as dropout",
    arxiv="2303.01610",
    lr=(1e-4, 1e-3, 3e-3),
    unverified="Published for training from scratch; splitting a pretrained FFN and the factor N are our own.",
)
def smoe_dropout(
    experts: int = 16,
    k_min: int | None = None,
    k_max: int | None = None,
    schedule: str = "linear",
    split: str = "kmeans",
    dense: bool = False,
    seed: int = 0,
    tuned: str | None = "all",
    sites: str | list[str] = "mlp",
) -> Recipe:
    """y = W2 (N w(x) * f(W1 x)), w = softmax over the top k of R x, R random and frozen; k from k_min to k_max.

    `k_min` is half of the experts if not given. `tuned` selects what is trained of the backbone; None leaves that to
    other deltas.
    """
    mask = SMoEDropout(
        experts,
        split,  # type: ignore[arg-type]
        dense,
        seed,
        sites,
        k_min or max(1, experts // 2),
        k_max,
        schedule=schedule,  # type: ignore[arg-type]
    )
    deltas = [mask] if tuned is None else [mask, ExistingWeights(tuned)]
    return Recipe(delta=deltas, diagnose=RouterLog())
