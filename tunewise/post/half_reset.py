"""theta <- theta_0 on a random half of the matrices of a tuned model."""

from __future__ import annotations

import torch

from tunewise.core.errors import UserError
from tunewise.core.handle import Handle
from tunewise.delta.half import frozen_half

__all__ = ["half_reset"]


@torch.no_grad()
def half_reset(handle: Handle, share: float = 0.5, level: str = "category", seed: int = 0) -> int:
    """The trained base parameters that half fine-tuning would have frozen become the pretrained ones again.

    share is what stays tuned; gives the number of scalars that were reset. Raises `UserError` where no base parameter
    is trained or no copy of the originals is kept. Source: Half-Reset of HFT, arXiv 2404.18466.
    """
    if not handle.existing or not handle.undo:
        raise UserError("Half-Reset needs trained base parameters and their originals (full, undo=True).")
    chosen = sorted(handle.existing.keys() & frozen_half(handle.model, share, level, seed, 0))
    for name in chosen:
        handle.existing[name].ours.copy_(handle.existing[name].original)
    return sum(handle.existing[name].ours.numel() for name in chosen)
