"""A light decoder on frozen latents: a shallow head for a target that the model was not trained for."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.head.latent_decoder import LatentDecoder


@method(
    "light_decoder",
    title="Light decoder on frozen latents",
    arxiv="2506.19088",
    lr=(5e-3, 2e-2, 5e-2),
    unverified="No code was read and the paper is about weather fields: the sizes are our reading.",
)
def light_decoder(ratio: float = 1.0, pooling: str = "mean") -> Recipe:
    """D(z) = W_2 gelu(W_1 LN(z) + b_1) + b_2, z frozen."""
    return Recipe(head=LatentDecoder(ratio=ratio, pooling=pooling))  # type: ignore[arg-type]
