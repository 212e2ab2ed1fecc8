"""Houlsby's adapters: in series after both sub-layers, with the norms trained too."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.adapter import SeriesAdapter
from tunewise.delta.existing import ExistingWeights


@method("houlsby", title="Houlsby adapters with trained norms", arxiv="1902.00751", lr=(1e-4, 1e-3, 5e-3))
def houlsby(
    size: int = 64,
    function: str = "gelu",
    dropout: float = 0.0,
    norms: bool = True,
    sites: str | list[str] = "attention | mlp",
) -> Recipe:
    """y' = y + W_up f(W_down y + b_down) + b_up before both residuals; gains and biases of all norms trained.

    AdapterHub's `double_seq_bn` is norms=False. W_up starts at 0, where the paper starts near it.
    """
    adapter = SeriesAdapter(size=size, function=function, dropout=dropout, sites=sites)  # type: ignore[arg-type]
    return Recipe(delta=[adapter, ExistingWeights("norm")] if norms else adapter)
