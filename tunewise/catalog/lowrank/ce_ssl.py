"""CE-SSL's fine-tuning: randomly deactivated LoRA with ranks allocated once."""

from tunewise.allocate.one_shot import OneShotRanks
from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.deactivated import DeactivatedLoRA
from tunewise.delta.existing import ExistingWeights


@method(
    "ce_ssl",
    title="Randomly deactivated LoRA with one-shot ranks (CE-SSL)",
    arxiv="2406.14377",
    lr=(3e-4, 2e-3, 1e-2),
)
def ce_ssl(
    rank: int = 16,
    scale: float = 1.0,
    deactivation: float = 0.2,
    fraction: float = 0.6,
    low: int | None = None,
    sites: str | list[str] = "linear",
) -> Recipe:
    """W' = W + g s B A, P(g = 0) = p per site and step, b' trained; rank `low` where (W * dL/dB A)^2 is least."""
    lora = DeactivatedLoRA(rank=rank, alpha=scale * rank, sites=sites, deactivation=deactivation)
    return Recipe(
        delta=[lora, ExistingWeights("all", "bias")],
        allocate=OneShotRanks(fraction=fraction, low=low),
    )
