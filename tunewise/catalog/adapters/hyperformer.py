"""HyperFormer++: one network writes the adapters of all layers and tasks."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.hyper import HyperAdapter


@method("hyperformer", title="HyperFormer++", arxiv="2106.04489", lr=(1e-4, 4e-4, 1e-3))
def hyperformer(
    size: int = 8,
    tasks: int = 1,
    task: int = 0,
    embedding: int = 64,
    projected: int = 64,
    hidden: int = 128,
    sites: str | list[str] = "attention | mlp",
) -> Recipe:
    """y' = y + LN(W_up f(W_down y + b_down) + b_up), each W = G I, I = LN(MLP([z_task; z_layer; z_position]))."""
    part = HyperAdapter(
        size=size,
        tasks=tasks,
        task=task,
        embedding=embedding,
        projected=projected,
        hidden=hidden,
        sites=sites,
    )
    return Recipe(delta=part)
