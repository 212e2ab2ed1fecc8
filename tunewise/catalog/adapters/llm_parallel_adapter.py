"""LLM-Adapters, parallel form: beside linear layers."""

from typing import Any, Literal

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.adapter import ParallelAdapter


@method(
    "llm_parallel_adapter",
    title="Parallel adapter of LLM-Adapters",
    arxiv="2304.01933",
    lr=(1e-4, 5e-4, 3e-3),
)
def llm_parallel_adapter(
    size: int = 256,
    function: str = "tanh",
    dropout: float = 0.0,
    scale: float | Literal["learned"] = 1.0,
    sites: str | list[str] = "query | key | value",
    start: str = "zero",
) -> Recipe:
    """y = W x + b + s W_up f(W_down x) at single linear layers.

    start="bert" is the library's default start. function="identity" is LoRA, and can be merged.
    """
    options: dict[str, Any] = {"size": size, "function": function, "dropout": dropout, "scale": scale}
    options |= {"bias": False, "start": start}
    return Recipe(delta=ParallelAdapter(sites=sites, **options))
