"""EMoE: a dense FFN is tuned as a mixture of its own parts, and served dense."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.existing import ExistingWeights
from tunewise.delta.hidden_experts import EMoE
from tunewise.diagnose.routing import RouterLog


@method("emoe", title="Emergent mixture-of-experts", arxiv="2310.10908", lr=(1e-4, 3e-4, 1e-3))
def emoe(
    experts: int = 64,
    k: int = 16,
    split: str = "kmeans",
    noise: float = 0.0,
    dense: bool = True,
    tuned: str | None = "all",
    sites: str | list[str] = "mlp & layers[-2]",
) -> Recipe:
    """y = W2 (m(x) * f(W1 x)), m = 1 on the k of N groups of units with the largest mean of W1 x.

    `tuned` selects what is trained of the backbone; None leaves that to other deltas, as in emoe(tuned=None) + lora.
    The masks act in training; after it the FFN is the dense one again, unless dense=False.
    """
    mask = EMoE(experts, split, dense, sites=sites, k=k, noise=noise)  # type: ignore[arg-type]
    deltas = [mask] if tuned is None else [mask, ExistingWeights(tuned)]
    return Recipe(delta=deltas, diagnose=RouterLog())
