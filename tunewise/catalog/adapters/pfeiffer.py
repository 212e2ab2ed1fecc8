"""Pfeiffer's adapters: in series after the feed-forward sub-layer alone."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.adapter import SeriesAdapter


@method("pfeiffer", title="Pfeiffer adapters (AdapterFusion)", arxiv="2005.00247", lr=(1e-4, 1e-3, 5e-3))
def pfeiffer(
    size: int = 48, function: str = "relu", dropout: float = 0.0, sites: str | list[str] = "mlp"
) -> Recipe:
    """y' = y + W_up f(W_down y + b_down) + b_up after the feed-forward sub-layer, before its residual.

    AdapterHub's `seq_bn` is placed alike, but its W_down reads the sum of y and the residual, normalised where the
    model normalises it there.
    """
    return Recipe(delta=SeriesAdapter(size=size, function=function, dropout=dropout, sites=sites))  # type: ignore[arg-type]
