"""Rows of a matrix in groups of equal size: contiguous, random, or by balanced k-means."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .random import generator

__all__ = ["balanced_clusters", "split_rows"]

SWAPS = 50
"""Rounds of exchanges after an assignment; each only lowers the distance."""


def split_rows(W: Tensor, groups: int, how: str, seed: int) -> Tensor:
    """The group of each row of W `[rows, in]`, int64 `[rows]`, all groups of rows / groups rows.

    how   "kmeans" of the rows' directions, "random", "contiguous"; a W without values (meta) is split contiguously
    """
    even = torch.arange(len(W)) // (len(W) // groups)
    if how == "random":
        return even[torch.randperm(len(W), generator=generator(seed))]
    if how == "contiguous" or W.is_meta:
        return even
    return balanced_clusters(F.normalize(W.detach().float().cpu(), dim=1), groups, seed)


@torch.no_grad()
def balanced_clusters(X: Tensor, groups: int, seed: int, rounds: int = 30) -> Tensor:
    """The cluster of each row of X `[rows, in]`, all of equal size: sum |x - centre|^2 is low, not proven least.

    Lloyd's steps whose assignment respects the sizes: rows choose in the order of what a second choice would cost them,
    then pairs are exchanged while that helps. The best round is kept, so the sum never rises. Centres start as rows
    far from each other (k-means++), drawn from `seed`.
    """
    centres = _start(X, groups, seed)
    best: Tensor | None = None
    least = float("inf")
    for _ in range(rounds):
        cost = torch.cdist(X, centres).square()
        found = _exchanged(cost, _assigned(cost))
        centres = torch.stack([X[found == g].mean(0) for g in range(groups)])
        total = float((X - centres[found]).square().sum())
        if total >= least * (1 - 1e-6):
            break
        best, least = found, total
    assert best is not None
    return best


def _start(X: Tensor, groups: int, seed: int) -> Tensor:
    make = generator(seed)
    chosen = [int(torch.randint(len(X), (), generator=make))]
    far = (X - X[chosen[0]]).square().sum(1)
    for _ in range(groups - 1):
        share = far if bool(far.sum() > 0) else torch.ones(len(X))
        chosen.append(int(torch.multinomial(share, 1, generator=make)))
        far = torch.minimum(far, (X - X[chosen[-1]]).square().sum(1))
    return X[chosen]


def _assigned(cost: Tensor) -> Tensor:
    """Greedy: in each round every open row asks for its cheapest group with room, and the neediest get it."""
    rows, groups = cost.shape
    found = torch.full((rows,), -1)
    room = torch.full((groups,), rows // groups)
    cost = cost.clone()
    while bool((found < 0).any()):
        waiting = (found < 0).nonzero()[:, 0]
        open_cost = cost[waiting].masked_fill(room == 0, float("inf"))
        two = open_cost.topk(min(2, groups), dim=1, largest=False)
        regret = two.values[:, -1] - two.values[:, 0]
        for g in two.indices[:, 0].unique().tolist():
            asking = (two.indices[:, 0] == g).nonzero()[:, 0]
            taken = asking[regret[asking].argsort(descending=True)[: int(room[g])]]
            found[waiting[taken]] = g
            room[g] -= len(taken)
    return found


def _exchanged(cost: Tensor, found: Tensor) -> Tensor:
    """Two groups exchange the rows whose going over is cheapest, the best pairs of groups first, while it helps."""
    rows, groups = cost.shape
    for _ in range(SWAPS if groups > 1 else 0):
        members = found.argsort(stable=True).view(groups, -1)
        move = cost - cost.gather(1, found.unsqueeze(1))  # what going to each group costs a row
        least, which = move[members].min(1)  # [from, to]
        gain = least + least.T
        free, changed = [True] * groups, False
        for pair in gain.triu(1).flatten().argsort().tolist():
            a, b = divmod(pair, groups)
            if float(gain[a, b]) >= -1e-7 or a >= b:
                break
            if free[a] and free[b]:
                found[members[a, which[a, b]]], found[members[b, which[b, a]]] = b, a
                free[a] = free[b] = False
                changed = True
        if not changed:
            break
    return found
