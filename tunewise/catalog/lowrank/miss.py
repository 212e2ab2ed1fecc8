"""MiSS: one matrix shared by all blocks of input columns."""

from typing import Literal

from tunewise.core.errors import UserError
from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.miss import BlockAffine, MiSS


@method("miss", title="MiSS (Bone, DiSHA)", arxiv="2409.15371", lr=(5e-5, 2e-4, 5e-4))
def miss(
    rank: int = 32,
    variant: Literal["balance", "mini", "bat"] = "balance",
    mini: int | None = None,
    dropout: float = 0.0,
    sites: str | list[str] = "linear",
) -> Recipe:
    """W' = W + [D^T, D^T, ...]; "mini": D = [D_mini, D_mini, ...]; "bat": W'_ac = W_ac (I + D_a) + D_a."""
    if variant not in ("balance", "mini", "bat"):
        raise UserError(f'miss has no variant "{variant}": balance, mini or bat.')
    if (variant == "mini") != (mini is not None):
        raise UserError(
            'miss: mini=... is the width of D_mini; it goes with variant="mini" and is needed there.'
        )
    if variant == "bat":
        if dropout:
            raise UserError('miss: variant="bat" changes the weight itself and has no dropout.')
        return Recipe(delta=BlockAffine(rank, sites))
    return Recipe(delta=MiSS(rank, mini, dropout, sites))
