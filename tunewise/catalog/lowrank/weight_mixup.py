"""Attention-guided weight mixup: trained and pretrained weights mixed by rank-one factors."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.existing import ExistingWeights
from tunewise.delta.mixup import LooseMixup, WeightMixup
from tunewise.optim.adamw import AdamW

NO_DECAY = {"bias": 0.0, "scale": 0.0, "gate": 0.0, "magnitude": 0.0, "mix": 0.0}


@method("weight_mixup", title="Attention-guided weight mixup", lr=(1e-5, 1e-4, 3e-4))
def weight_mixup(
    spread: float = 0.005, complement: bool = True, rate: float = 100.0, sites: str | list[str] = "linear"
) -> Recipe:
    """W' = M * T + (1 - M) * W, b' trained, M = u v in [0, 1] at `rate` times the learning rate of T."""
    mixup = (WeightMixup if complement else LooseMixup)(spread, sites)
    return Recipe(
        delta=[mixup, ExistingWeights(sites, "bias")],
        optimizer=AdamW(rates={"mix": rate}, decays=NO_DECAY),
    )
