"""LoCA: location-aware cosine adaptation."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.spectral import LoCA
from tunewise.optim.adamw import AdamW


@method("loca", title="Location-aware cosine adaptation", arxiv="2502.06820", lr=(5e-4, 5e-3, 2e-2))
def loca(
    frequencies: int = 1000,
    scale: float = 1.0,
    location_steps: int | None = None,
    location_rate: float = 0.02,
    sites: str | list[str] = "linear",
) -> Recipe:
    """W' = W + scale C^T F C (inverse DCT), F with trained coefficients at trained places."""
    still = {**AdamW().decays, "mask": 0.0}
    return Recipe(
        delta=LoCA(frequencies, scale, location_steps=location_steps, sites=sites),
        defaults={"optimizer": AdamW(rates={"mask": location_rate}, decays=still)},
    )
