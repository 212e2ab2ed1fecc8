"""What another seed would change, from the few seeds of several methods: moderated variances.

Two or three seeds say little about their own variance, those of all methods together say enough. So the variances
of the methods are drawn towards a common one, as those of genes are: Smyth 2004, "Linear models and empirical Bayes
methods". That the variances of few methods leave open how much they differ is averaged over, and a method whose
seeds differ like no other's neither lends nor borrows (Phipson et al. 2016; several of them: Rosner 1983).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

__all__ = ["SeedNoise", "Source", "Spread", "moderated"]

Source = Literal["measured", "lent", "none", "unknown"]
# Prior degrees of freedom, from variances that have nothing in common to equal ones.
FREEDOMS = np.array([1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 1e6])
# Steps of the common variance, as shares of the largest measured one.
SHARES = np.geomspace(1e-4, 4, 80)
# Level at which seeds differ like no other method's, for all methods together.
UNLIKE = 0.05


@dataclass(frozen=True)
class Spread:
    """The scores of one method's seeds: between = s^2, their variance, of which the choice of rows explains `rows`.

    fixed  no seed changes the method: it neither lends nor borrows
    """

    seeds: int
    between: float = 0.0
    rows: float = 0.0
    fixed: bool = False

    @property
    def freedom(self) -> int:
        """d = S - 1; 0 where all seeds agree on every row, which is no example of what seeds do."""
        return self.seeds - 1 if self.between > 0 or self.rows > 0 else 0


@dataclass(frozen=True)
class SeedNoise:
    """variance: of the mean over a method's seeds, through their choice alone, without that of test rows.

    size    the estimate that it rests on, which rows are still part of: s~^2 / S
    own     relative variance of `size`, halved, that is the method's own: 1 / (d0 + d)
    shared  the part that comes with the common variance, so that methods have it together
    source  "measured", "lent" by other methods, "none" without a seed, "unknown" if no method has two seeds
    """

    source: Source
    variance: float = 0.0
    size: float = 0.0
    own: float = 0.0
    shared: float = 0.0


@dataclass(frozen=True)
class _Common:
    """variance t^2 of seeds, `inverse` 1 / d0 of its prior degrees of freedom, 1 / degrees known about t^2."""

    variance: float
    inverse: float
    doubt: float


def moderated(spreads: Sequence[Spread]) -> list[SeedNoise]:
    """v = max(0, (d0 t^2 + d (s^2 - rows)) / (d0 + d)) / S, with d0 + d degrees of freedom and what t^2 has.

    The variance s^2 of a method's seeds is (t^2 + rows) F with d and d0 degrees of freedom; t^2 and 1 / d0 are means
    over their likelihood, flat in log t^2. Of one seed (d = 0) it is t^2; the doubt about t^2 counts with each.
    """
    pool = _alike([s for s in spreads if s.freedom and not s.fixed])
    common = _common(pool) if pool else None
    return [_noise(s, common if s in pool or not s.freedom else None) for s in spreads]


def _noise(spread: Spread, common: _Common | None) -> SeedNoise:
    d = spread.freedom
    source: Source = "measured"
    if not d:
        if spread.fixed or spread.seeds > 1:
            return SeedNoise("none")
        if common is None:
            return SeedNoise("unknown")
        source = "lent"
    if common is None or spread.fixed:
        left, size, own, shared = spread.between - spread.rows, spread.between, 1 / d, 0.0
    else:
        own = common.inverse / (1 + d * common.inverse)
        weight = 1 - d * own
        left = weight * common.variance + (1 - weight) * (spread.between - spread.rows)
        size, shared = left + spread.rows, weight**2 * common.doubt
    seeds = spread.seeds
    return SeedNoise(source, max(0.0, left) / seeds, size / seeds, own, shared)


def _alike(spreads: list[Spread]) -> list[Spread]:
    """Without those whose variance is beyond an F distribution around the rest's, however many of less than half."""
    from scipy.special import fdtrc

    rest = kept = spreads
    for _ in range((len(spreads) - 1) // 2):
        common = _common(rest)
        most = max(rest, key=lambda s: s.between / (common.variance + s.rows))
        count, rest = len(rest), [s for s in rest if s is not most]
        common = _common(rest)
        ratio = most.between / (common.variance + most.rows)
        if count * fdtrc(most.freedom, 1 / (common.inverse + common.doubt), ratio) < UNLIKE:
            kept = rest
    return kept


def _common(spreads: Sequence[Spread]) -> _Common:
    """Means of t^2 and 1 / d0 over the likelihood on a grid; one method alone has its own variance."""
    d = np.array([s.freedom for s in spreads], dtype=float)
    between, rows = np.array([s.between for s in spreads]), np.array([s.rows for s in spreads])
    if len(spreads) == 1:
        return _Common(max(0.0, float(between[0] - rows[0])), 0.0, 1 / float(d[0]))
    from scipy.special import betaln

    steps = SHARES * max(between.max(), rows.max())
    scale, prior = steps[:, None, None] + rows, FREEDOMS[:, None]
    # Of the F density what depends on t^2 and d0: equal scores of all seeds (s^2 = 0) are no trouble to it.
    likelihood = -betaln(d / 2, prior / 2) - d / 2 * np.log(prior * scale)
    likelihood = (likelihood - (d + prior) / 2 * np.log1p(d * between / (prior * scale))).sum(axis=2)
    weights = np.exp(likelihood - likelihood.max())
    weights /= weights.sum()
    inverse = float((weights.sum(axis=0) / FREEDOMS).sum())
    doubt = float((1 / d + inverse).mean()) / len(d)
    return _Common(float(weights.sum(axis=1) @ steps), inverse, doubt)
