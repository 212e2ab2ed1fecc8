"""W_task = (G_A z_task)(G_B z_task): adapters written by two thin generators, scaled to a layer by K (kron) W."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor

from tunewise.core.delta import P
from tunewise.core.errors import UserError
from tunewise.sites import Site

from .adapter import Weights, ends
from .hyper import Generated

__all__ = ["PolyhistorAdapter", "PolyhistorLite"]


class PolyhistorAdapter(Generated):
    """W_down = A B, A = G_A z `[size, inner]`, B = G_B z `[inner, width]`; W_up `[width, size]` likewise.

    Each site has generators of its own, `[size inner, embedding]` and so on, instead of one for whole matrices, `[size
    width, embedding]`; the embedding z of a task is shared by all sites. G starts as N(0, 0.01), but G_A of W_up at 0,
    so step 0 is the base model. Trainable scalars per site: 2 embedding inner (size + width). Source: arXiv
    2210.03265; that there are no biases, the start at 0, and the sizes are our own reading.
    """

    size: PositiveInt = 8
    inner: PositiveInt = 2

    def shared(self, sites: Sequence[Site]) -> dict[str, P]:
        return self.embeddings()

    def tensors(self, site: Site) -> dict[str, P]:
        return self.generators(ends(site, self.reads)[0]) | self.factor()

    def generators(self, width: int) -> dict[str, P]:
        """G_A and G_B of both projections for adapters of this width."""

        def start(rows: int, spread: float = 0.01) -> P:
            return P(torch.randn(rows, self.embedding) * spread, "weight")

        return {
            "down_A": start(self.size * self.inner),
            "down_B": start(self.inner * width),
            "up_A": start(width * self.inner, 0.0),
            "up_B": start(self.inner * self.size),
        }

    def matrices(self, g: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        """(W_down, W_up) that the generators of `g` write for z."""

        def product(name: str) -> Tensor:
            A, B = getattr(g, f"{name}_A") @ z, getattr(g, f"{name}_B") @ z
            return A.view(-1, self.inner) @ B.view(self.inner, -1)

        return product("down"), product("up")

    def weights(self, t: Any) -> Weights:
        return Weights(*self.matrices(t, t.shared.tasks[self.task]))

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        width = ends(site, self.reads)[0]
        return 2 * self.embedding * self.inner * (self.size + width) + (self.scale == "learned")


class PolyhistorLite(PolyhistorAdapter):
    """W_down = K_down (kron) T_down, W_up = K_up (kron) T_up, with templates T = A B of the narrowest width among
    the sites, written once per task for all of them, and K `[c, c]` per site, c = its width / the narrowest.

    K starts as the identity / c; a site's bottleneck is c size. Widths that are no multiples of the narrowest are
    refused (`UserError`). Trainable scalars: 2 embedding inner (size + narrowest) once, 2 c^2 per site. Source: arXiv
    2210.03265; one template for all blocks and the start of K are our own reading.
    """

    _narrowest = 1  # of the sites; unannotated: no option

    def shared(self, sites: Sequence[Site]) -> dict[str, P]:
        self._narrowest = min(ends(s, self.reads)[0] for s in sites)
        return self.embeddings() | self.generators(self._narrowest)

    def _times(self, site: Site) -> int:
        width = ends(site, self.reads)[0]
        if width % self._narrowest:
            raise UserError(
                f"The width of {site.name}, {width}, is no multiple of the narrowest, {self._narrowest}: choose other "
                "sites, or polyhistor."
            )
        return width // self._narrowest

    def tensors(self, site: Site) -> dict[str, P]:
        c = self._times(site)
        kernels = {n: P(torch.eye(c) / c, "scale") for n in ("K_down", "K_up")}
        return kernels | self.factor()

    def weights(self, t: Any) -> Weights:
        down, up = self.matrices(t.shared, t.shared.tasks[self.task])
        return Weights(torch.kron(t.K_down, down), torch.kron(t.K_up, up))

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        return 2 * self._times(site) ** 2 + (self.scale == "learned")
