"""OLoRA: LoRA that starts with an orthonormal part of W."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.lora import LoRA
from tunewise.init.qr import QR


@method("olora", title="Orthonormal Low-Rank Adaptation", arxiv="2406.01775", lr=(1e-4, 1e-3, 3e-3))
def olora(rank: int = 8, alpha: float | None = None, sites: str | list[str] = "linear") -> Recipe:
    """W' = W + B A - Q_r R_r, B_0 = Q_r and A_0 = R_r of W = Q R (alpha: rank unless given)."""
    return Recipe(delta=LoRA(rank, alpha or rank, sites=sites, init=QR()))
