"""LLM-Adapters, series form: before the first linear layers of the feed-forward sub-layer and behind the last."""

from typing import Any, Literal

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.adapter import InputAdapter, SeriesAdapter


@method(
    "llm_series_adapter", title="Series adapter of LLM-Adapters", arxiv="2304.01933", lr=(1e-4, 5e-4, 3e-3)
)
def llm_series_adapter(
    size: int = 256,
    function: str = "tanh",
    dropout: float = 0.0,
    scale: float | Literal["learned"] = 1.0,
    last: bool = False,
    start: str = "zero",
) -> Recipe:
    """y = W (x + Ad(x)) + b at up and gate, y = z + Ad(z), z = W x + b, at down; Ad(h) = s W_up f(W_down h).

    So it stands at gate_proj, up_proj and down_proj of Llama, fc1 and fc2 of OPT, dense_h_to_4h and dense_4h_to_h of
    BLOOM. `last` leaves the one behind down alone (the library's AdapterP); start="bert" is its default start.
    """
    options: dict[str, Any] = {"size": size, "function": function, "dropout": dropout, "scale": scale}
    options |= {"bias": False, "start": start}
    behind = SeriesAdapter(sites="down", **options)
    return Recipe(delta=behind if last else [InputAdapter(**options), behind])
