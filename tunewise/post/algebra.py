"""sum_i w_i theta_i of whole adaptations; scale, sum and low-rank form of materialized changes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tunewise.core.errors import UserError, did_you_mean

__all__ = ["add", "average", "ema", "interpolate", "scale", "to_lora", "to_lora_from_components"]

State = dict[str, Tensor]


def average(states: Sequence[State], weights: Sequence[float] | None = None) -> State:
    """sum_i w_i theta_i / sum_i w_i of `handle.state()` dicts, in float32 or wider; equal weights if none.

    Raises `UserError` for other names, shapes or indices, and for weights that sum to 0.
    """
    given = [1.0] * len(states) if weights is None else [float(w) for w in weights]
    if len(given) != len(states) or sum(given) == 0:
        raise UserError(f"{len(states)} states need as many weights with a sum other than 0, not {given}.")
    return _combine(states, [w / sum(given) for w in given])


def interpolate(a: State, b: State, t: float) -> State:
    """(1 - t) a + t b; t may lie outside [0, 1] (extrapolation)."""
    return _combine([a, b], [1.0 - t, t])


def ema(a: State, b: State, decay: float) -> State:
    """decay a + (1 - decay) b: one step of an exponential moving average a over the values b."""
    if not 0.0 <= decay <= 1.0:
        raise UserError(f"The decay of a moving average lies between 0 and 1, not {decay}.")
    return interpolate(b, a, decay)


def scale(change: State, factor: float) -> State:
    """factor dW for every site of `handle.materialize()`."""
    return {name: value * factor for name, value in change.items()}


def add(*changes: State) -> State:
    """sum_i dW_i of `handle.materialize()`; a site that one of them lacks counts as 0 there."""
    total: State = {}
    for change in changes:
        for name, value in change.items():
            _same_shape(name, total.get(name, value), value)
            total[name] = total[name] + value if name in total else value.clone()
    return total


@torch.no_grad()
def to_lora(change: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """(B, A, error): B A is the best approximation of dW `[out, in]` by rank k = min(rank, out, in).

    B `[out, k]` and A `[k, in]` share the singular values; error = |dW - B A| / |dW| (Frobenius), which is
    rounding where the rank suffices (Eckart-Young). Raises `UserError` for anything but a matrix.
    """
    if change.dim() != 2 or rank < 1:
        raise UserError(f"A low-rank form needs a matrix and a rank, not {tuple(change.shape)} and {rank}.")
    wide = change.to(torch.promote_types(change.dtype, torch.float32))
    u, s, v = torch.linalg.svd(wide, full_matrices=False)
    return _truncated(u, s, v, rank)


@torch.no_grad()
def to_lora_from_components(
    components: Sequence[tuple[Tensor, Tensor, float]], rank: int | None = None
) -> tuple[Tensor, Tensor, float]:
    """(B, A, error) of sum_i w_i B_i A_i: stacked where `rank` holds them, else QR and SVD."""
    if not components or (rank is not None and rank < 1):
        raise UserError("A low-rank form needs at least one pair of factors and a rank above 0.")
    b = torch.cat([w * up for up, _, w in components], 1)
    a = torch.cat([down for _, down, _ in components], 0)
    if rank is None or b.shape[1] <= rank:
        return b, a, 0.0
    wide = torch.promote_types(b.dtype, torch.float32)
    (qb, rb), (qa, ra) = torch.linalg.qr(b.to(wide)), torch.linalg.qr(a.to(wide).T)
    u, s, v = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    return _truncated(qb @ u, s, v @ qa.T, rank)


def _truncated(u: Tensor, s: Tensor, v: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    root = s[:rank].sqrt()
    lost = float(s[rank:].norm() / s.norm()) if float(s.norm()) > 0 else 0.0
    return u[:, :rank] * root, root[:, None] * v[:rank], lost


def _same_shape(name: str, a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise UserError(
            f"{name} has the shapes {tuple(a.shape)} and {tuple(b.shape)}: they cannot be combined."
        )


@torch.no_grad()
def _combine(states: Sequence[State], weights: Sequence[float]) -> State:
    first, found = states[0], {}
    for other in states[1:]:
        for name in sorted(first.keys() ^ other.keys()):
            raise UserError(f"Only one of the adaptations has the tensor {name}{did_you_mean(name, first)}")
    for name, start in first.items():
        values = [state[name] for state in states]
        for value in values[1:]:
            _same_shape(name, start, value)
        if not start.is_floating_point():
            if not all(torch.equal(start, value) for value in values[1:]):
                raise UserError(f"{name} holds indices that differ: they cannot be averaged.")
            found[name] = start.clone()
            continue
        wide = torch.promote_types(start.dtype, torch.float32)
        total = torch.zeros_like(start, dtype=wide)
        for value, weight in zip(values, weights, strict=True):
            total.add_(value.to(start.device, wide), alpha=weight)
        found[name] = total.to(start.dtype)
    return found
