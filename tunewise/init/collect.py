"""What is kept of the inputs of a site: covariance, and incremental principal components."""

from __future__ import annotations

import torch
from torch import Tensor

from .svd import top_svd

__all__ = ["Collector", "Components", "Covariance"]

ITERATIONS = 4


class Collector:
    """Takes rows `[n, in]`, as many times as there are, and keeps less than them."""

    def add(self, x: Tensor) -> None:
        """Rows `[n, in]` of one call, n > 0."""
        raise NotImplementedError

    @property
    def empty(self) -> bool:
        """Whether nothing was kept so far."""
        raise NotImplementedError


class Covariance(Collector):
    """C = mean over calls of X' X, X divided by |max X| of its call, `[in, in]` in float32."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.calls = 0

    def add(self, x: Tensor) -> None:
        rows = x.float()
        top = rows.max().abs()
        rows = rows / torch.where(top > 0, top, torch.ones_like(top))
        product = rows.T @ rows
        self.total = product if self.total is None else self.total.add_(product)
        self.calls += 1

    @property
    def empty(self) -> bool:
        return self.total is None

    @property
    def value(self) -> Tensor:
        """C."""
        assert self.total is not None
        return self.total / self.calls


class Components(Collector):
    """The `count` leading principal components of all rows so far, by incremental PCA (mean removed).

    components `[count, in]` with orthonormal rows; singular `[count]`; ratios `[count]`, each component's share
    of the variance; near `[count]`, the cosine between a component and its last estimate. The first rows
    wait until there are `count` of them. Source: Ross et al. 2008, as scikit-learn's IncrementalPCA.
    """

    def __init__(self, count: int) -> None:
        self.count, self.seen = count, 0
        self.components = self.singular = torch.empty(0)
        self.near = torch.zeros(count)
        self._mean = torch.empty(0)
        self._spread = torch.zeros((), dtype=torch.float64)
        self._waiting: list[Tensor] = []

    @property
    def empty(self) -> bool:
        return self.seen == 0

    @property
    def ratios(self) -> Tensor:
        """S^2 / total variance, in float64 on the CPU."""
        return (self.singular.double().square() / self._spread.clamp(min=1e-300)).cpu()

    def add(self, x: Tensor) -> None:
        self._waiting.append(x.float())
        if self.seen or sum(map(len, self._waiting)) >= self.count:
            rows, self._waiting = torch.cat(self._waiting), []
            self._fit(rows)

    def _fit(self, x: Tensor) -> None:
        n, before = len(x), self.seen
        mean = x.mean(0, dtype=torch.float64)
        rows = x - mean.float()
        spread = rows.double().square().sum()
        if before:
            between = (self._mean - mean) * (before * n / (before + n)) ** 0.5
            kept = self.singular.unsqueeze(-1) * self.components
            rows = torch.cat([kept, rows, between.float().unsqueeze(0)])
            spread = spread + self._spread + between.square().sum()
            mean = (self._mean * before + mean * n) / (before + n)
        _, singular, components = top_svd(rows, self.count, ITERATIONS)
        components = _with_signs(components)
        if before:
            self.near = torch.cosine_similarity(components, self.components).cpu()
        self.components, self.singular = components, singular
        self._mean, self._spread, self.seen = mean, spread, before + n


def _with_signs(components: Tensor) -> Tensor:
    """The largest entry of every row is positive, so that two estimates can be compared."""
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    return components * torch.where(largest < 0, -1.0, 1.0)
