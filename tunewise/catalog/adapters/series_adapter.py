"""Series adapters after the attention and the feed-forward sub-layer."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.adapter import SeriesAdapter


@method(
    "series_adapter", title="Series bottleneck adapter (Houlsby)", arxiv="1902.00751", lr=(1e-4, 1e-3, 5e-3)
)
def series_adapter(
    size: int = 16, function: str = "gelu", sites: str | list[str] = "attention | mlp"
) -> Recipe:
    """y' = y + W_up f(W_down y + b_down) + b_up, before the residual."""
    return Recipe(delta=SeriesAdapter(size=size, function=function, sites=sites))  # type: ignore[arg-type]
